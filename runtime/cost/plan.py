"""The cost sheet of one decode step, computed from sizes alone, no GPU needed: each kernel's bytes, its waves of
programs and a lower bound of its time."""

from __future__ import annotations

import importlib
import math
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch

from runtime.checkpoint import sources
from runtime.cost.launches import integer_bytes, splits_at, step_launches
from runtime.errors import InvalidArgument
from runtime.kernels.launch import Gpu, Launch
from runtime.loading import read_config
from runtime.model import memory_plan
from runtime.model.config import ModelConfig, RuntimeConfig
from runtime.model.placement import resolve_dtype
from runtime.model.published import PUBLISHED

# The fixed cost of a kernel in a captured step, measured on an H100: with and without dependent launch.
DEPENDENT_LAUNCH_US, LAUNCH_US = 0.75, 1.14


@dataclass(frozen=True)
class Target:
    """A GPU to plan for and its memory bandwidth in 10^9 bytes per second."""

    gpu: Gpu
    bandwidth_gb_s: float
    source: str


TARGETS = {
    "a100": Target(Gpu("NVIDIA A100-SXM4-80GB", 80, 108), 1750, "reading, published"),
    "h100": Target(Gpu("NVIDIA H100 80GB HBM3", 90, 132), 3154, "reading, measured by runtime.bench.gpu"),
    "h200": Target(Gpu("NVIDIA H200", 90, 132), 4480, "reading, published"),
    "b200": Target(Gpu("NVIDIA B200", 100, 148), 8000, "datasheet"),
    "rtx-3090": Target(Gpu("NVIDIA GeForce RTX 3090", 86, 82), 936, "datasheet"),
    "rtx-4090": Target(Gpu("NVIDIA GeForce RTX 4090", 89, 128), 1008, "datasheet"),
    "rtx-5090": Target(Gpu("NVIDIA GeForce RTX 5090", 120, 170), 1792, "datasheet"),
}


@dataclass(frozen=True)
class KernelCost:
    """One kernel at one shape; bytes and times are of a single launch."""

    kernel: str
    launches: int  # in one step
    programs: int
    waves: float  # programs for each multiprocessor
    tail_waste: float  # share of the multiprocessors' time lost in the last, partial wave
    bytes_read: int
    bytes_written: int
    floor_us: float  # the bytes at full bandwidth, plus the launch
    simulated_us: tuple[float, ...] = ()  # by each set of the simulator's constants, if it was asked for


@dataclass(frozen=True)
class Plan:
    """The cost sheet of one step; `print` it, or take `to_dict()` for JSON. Sizes are in bytes."""

    model: str
    dtype: str
    gpu: str
    multiprocessors: int
    bandwidth_gb_s: float
    bandwidth_source: str
    batch: int
    context: int
    kernels: tuple[KernelCost, ...]
    launches: int
    bytes_moved: int
    bytes_needed: int  # every weight once, and the cached keys and values in each layer's window
    floor_us: float
    simulated_step_us: tuple[float, ...] = ()  # as `simulated_us`
    simulated_with: tuple[str, ...] = ()  # the sets of constants
    simulated_error: str = ""  # how far simulated steps were from measured ones

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, without what was not simulated."""

        def given(fields: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in fields if value or not name.startswith("simulated")}

        made = asdict(self, dict_factory=given)
        if self.simulated_step_us:
            made["simulated_steps"] = {
                constants: {"step_us": time_us, "tokens_per_s": 1e6 / time_us * self.batch}
                for constants, time_us in zip(self.simulated_with, self.simulated_step_us, strict=True)
            }
        return made

    def __str__(self) -> str:
        heading: tuple[str, ...] = (
            "kernel",
            "launches",
            "programs",
            "waves",
            "tail",
            "MB read",
            "MB written",
            "floor us",
        )
        heading += tuple(f"simulated us, {constants}" for constants in self.simulated_with)
        rows = [
            (
                cost.kernel,
                f"{cost.launches}",
                f"{cost.programs:,}",
                f"{cost.waves:.2f}",
                f"{cost.tail_waste:.1%}",
                f"{cost.bytes_read / 1e6:,.3f}",
                f"{cost.bytes_written / 1e6:,.3f}",
                f"{cost.floor_us:,.2f}",
                *(f"{time_us:,.2f}" for time_us in cost.simulated_us),
            )
            for cost in self.kernels
        ]
        widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(len(heading))]
        lines = [
            f"one decode step of {self.model} in {self.dtype}, batch {self.batch}, context {self.context:,}, "
            f"on {self.gpu}",
            f"{self.multiprocessors} multiprocessors, {self.bandwidth_gb_s:,.0f} GB/s ({self.bandwidth_source})",
            "",
        ]
        for row in [heading, *rows]:
            lines.append("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
        return "\n".join(
            [
                *lines,
                "",
                f"{self.launches} launches move {self.bytes_moved / 1e6:,.1f} MB, "
                f"{self.bytes_moved / self.bytes_needed:.4f} of the {self.bytes_needed / 1e6:,.1f} MB needed",
                f"no step is faster than {self.floor_us:,.0f} us: at most "
                f"{1e6 / self.floor_us * self.batch:,.0f} tokens/s",
                *(
                    f"simulated step, {constants}: {time_us:,.0f} us, {1e6 / time_us * self.batch:,.0f} tokens/s"
                    for constants, time_us in zip(self.simulated_with, self.simulated_step_us, strict=True)
                ),
                *([f"simulated is not measured: {self.simulated_error}"] if self.simulated_error else []),
            ]
        )


def make_plan(
    config: ModelConfig,
    name: str,
    dtype: str,
    target: Target,
    *,
    batch: int = 1,
    context: int = 128,
    predict: bool = False,
    quantize: str | None = None,
) -> Plan:
    """Compute the cost sheet of a decode step.

    Args:
        config, name: the model.
        dtype: "float32", "bfloat16" or "float16".
        target: the GPU.
        batch: rows, 1 to 64, and the most that the model has.
        context: tokens of each row, the one being decoded included.
        predict: whether each kernel is also compiled and simulated.
        quantize: "int8" or "int4" for matrices of integers with scales; None for values of `dtype`.

    Raises:
        ValueError: batch or context is out of range, a width has no int4 kernels, or there is no simulation of that
            GPU, or none here.
    """
    if not 1 <= context <= config.max_position_embeddings:
        raise InvalidArgument(f"context must be 1 to {config.max_position_embeddings}, got {context}")
    gpu = target.gpu
    prediction = _prediction(target) if predict else None
    fits = prediction.fits(target.bandwidth_gb_s, gpu.multiprocessors) if prediction else []
    same: dict[tuple[Any, ...], tuple[KernelCost, list[Launch]]] = {}
    for launch in step_launches(config, dtype, gpu, batch=batch, max_seq_len=max(context, 4096), quantize=quantize):
        cost = _cost(launch, target, context)
        same.setdefault((cost.kernel, cost.programs, cost.bytes_read), (cost, []))[1].append(launch)
    sheet = tuple(
        replace(
            cost,
            launches=len(launches),
            simulated_us=prediction.simulated_us(launches[0], gpu.capability, context, fits) if prediction else (),
        )
        for cost, launches in same.values()
    )
    weight_bytes = integer_bytes(config, quantize) if quantize else {}
    needed = memory_plan.plan(config, RuntimeConfig("meta", dtype, context, batch), weight_bytes)
    cached = needed.bytes_per_token(context) - needed.weights_read
    return Plan(
        model=name,
        dtype=f"{quantize} and {dtype}" if quantize else dtype,
        gpu=gpu.name,
        multiprocessors=gpu.multiprocessors,
        bandwidth_gb_s=target.bandwidth_gb_s,
        bandwidth_source=target.source,
        batch=batch,
        context=context,
        kernels=sheet,
        launches=sum(cost.launches for cost in sheet),
        bytes_moved=sum(cost.launches * (cost.bytes_read + cost.bytes_written) for cost in sheet),
        bytes_needed=needed.weights_read + batch * cached,
        # fsum, since sum() rounds differently from Python 3.12 on.
        floor_us=math.fsum(cost.launches * cost.floor_us for cost in sheet),
        simulated_step_us=tuple(
            math.fsum(cost.launches * cost.simulated_us[index] for cost in sheet) for index in range(len(fits))
        ),
        simulated_with=tuple(f"{fit.clock_ghz:g} GHz" for fit in fits),
        simulated_error=prediction.ERROR if prediction else "",
    )


def _prediction(target: Target) -> ModuleType:
    """The module that simulates a GPU's kernels: runtime.cost.prediction, which needs numba."""
    if target.gpu.capability != 90:
        known = ", ".join(name for name, other in TARGETS.items() if other.gpu.capability == 90)
        raise InvalidArgument(f"a step can be simulated on {known}, not on {target.gpu.name}")
    try:
        return importlib.import_module("runtime.cost.prediction")
    except ImportError as error:
        raise InvalidArgument(f"simulating a step needs numba, which the extra `cpu` installs: {error}") from None


def gather(
    source: str | None,
    *,
    gpu: str,
    dtype: str = "auto",
    batch: int = 1,
    context: int = 128,
    predict: bool = False,
    quantize: str | None = None,
) -> Plan:
    """The cost sheet of a model by name; only its config is read.

    Args:
        source: a published size such as "gemma-1.1-2b", or as `load`.
        gpu: one of TARGETS.
        dtype: "auto" means the checkpoint's own, bfloat16 for a published size, float32 with `quantize`.
        batch, context, predict, quantize: as `make_plan`.

    Raises:
        ValueError: an argument is out of range. Else as `load`.
    """
    if gpu not in TARGETS:
        raise InvalidArgument(f"gpu must be one of {', '.join(TARGETS)}, got {gpu!r}")
    if source in PUBLISHED:
        config = ModelConfig.from_hf(PUBLISHED[source])
    else:
        source = sources.default_source() if source is None else source
        config = read_config(sources.locate(source).folder)
    dtype = resolve_dtype(dtype)
    if dtype == "auto":
        dtype = "float32" if quantize else config.stored_dtype or "bfloat16"
    target = TARGETS[gpu]
    return make_plan(config, source, dtype, target, batch=batch, context=context, predict=predict, quantize=quantize)


# The pointers that a kernel writes, if not just out_ptr, and those that it both reads and writes.
_WRITTEN = {
    "qkv_projection_kernel": {"out_ptr", "residual_out_ptr"},
    "qkv_projection_dot_kernel": {"out_ptr", "residual_out_ptr"},
    "decode_attention_kernel": {"partial_ptr", "stats_ptr"},
    "group_attention_kernel": {"partial_ptr", "stats_ptr"},
    "gated_mlp_kernel": {"out_ptr", "residual_out_ptr"},
    "gated_mlp_dot_kernel": {"out_ptr", "residual_out_ptr"},
    "residual_norm_kernel": {"normed_ptr", "residual_out_ptr"},
    "lm_head_kernel": {"logits_ptr"},
    "lm_head_dot_kernel": {"logits_ptr"},
    "advance_kernel": {"token_ptr", "x_ptr", "emitted_ptr"},
}
_UPDATED = {
    "decode_attention_kernel": {"k_cache_ptr", "v_cache_ptr"},
    "group_attention_kernel": {"k_cache_ptr", "v_cache_ptr"},
    "lm_head_kernel": {"argmax_keys_ptr"},
    "lm_head_dot_kernel": {"argmax_keys_ptr"},
    "advance_kernel": {"argmax_keys_ptr", "position_ptr", "done_ptr", "step_ptr"},
}


def _cost(launch: Launch, target: Target, context: int) -> KernelCost:
    name = launch.kernel.fn.__name__
    written, updated = _WRITTEN.get(name, {"out_ptr"}), _UPDATED.get(name, set())
    pointers = {pointer for pointer, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
    bytes_read = sum(_touched(launch, pointer, context, write=False) for pointer in pointers - written)
    bytes_written = sum(_touched(launch, pointer, context, write=True) for pointer in pointers & (written | updated))
    multiprocessors = target.gpu.multiprocessors
    programs = math.prod(launch.grid)
    launch_us = DEPENDENT_LAUNCH_US if launch.options.get("launch_pdl") else LAUNCH_US
    return KernelCost(
        kernel=name.removesuffix("_kernel"),
        launches=1,
        programs=programs,
        waves=programs / multiprocessors,
        # A multiprocessor takes the next program as soon as it has room, so the busiest one takes at most one more.
        tail_waste=1 - programs / (multiprocessors * math.ceil(programs / multiprocessors)),
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        floor_us=launch_us + (bytes_read + bytes_written) / target.bandwidth_gb_s / 1e3,
    )


def _touched(launch: Launch, pointer: str, context: int, *, write: bool) -> int:
    """The bytes of an argument that a launch reads or writes at this context: all of it, but only the used part of
    caches, tables and attention splits."""
    arguments = launch.arguments
    tensor = arguments[pointer]
    used, total = 1, 1
    if pointer in ("k_cache_ptr", "v_cache_ptr"):
        # The newest key and value are written, not read back.
        used, total = 1 if write else min(context, arguments["window"]) - 1, tensor.shape[2]
    elif pointer in ("partial_ptr", "stats_ptr"):
        used, total = 1 + splits_at(launch, context)[2], tensor.shape[1]
    elif pointer in ("cos_ptr", "sin_ptr"):
        used, total = len(arguments["position_ptr"]), len(tensor)
    elif pointer in ("table_ptr", "scale_ptr") and launch.kernel.fn.__name__ == "advance_kernel":
        used, total = arguments["rows"], len(tensor)
    elif pointer == "emitted_ptr":
        used, total = 1, len(tensor)
    return tensor.numel() * tensor.element_size() * used // total

"""`bench kernels`: each operation at a model's shapes, beside PyTorch's operation for the same."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from runtime.bench.environment import datasheet_gb_s
from runtime.bench.gates import start
from runtime.bench.measure import audit, ceiling_figures, load_model
from runtime.bench.products import Case, cases, operation
from runtime.bench.records import KernelRow, Samples
from runtime.bench.timing import captured, each
from runtime.cost.bandwidth import ReadBandwidth, device_seconds
from runtime.engine.graph import ops_of
from runtime.families.state import DecodeState, new_state
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.ops import Ops
from runtime.kernels.rms_norm import rms_norm_torch
from runtime.model.model import Model

Run = Callable[[], Any]


@dataclass(frozen=True)
class Pair:
    """An operation and PyTorch's equivalents, each repeated over distinct weights or caches, so that none is found in a
    cache of the processor."""

    kernel: str
    shape: str
    bytes: int  # that one launch must read
    launches: int  # in one run
    ours: Run
    peers: dict[str, Run]  # by the fields of a row: none where PyTorch has no equivalent operation


def rows(options: Namespace) -> Iterator[KernelRow]:
    """A row for each matrix product and number of rows, and for attention at each context, in every dtype.

    Args:
        options: model, device, warmup, repeat; and lists: dtype, batch_size, context.
    """
    for dtype in options.dtype:
        longest, most = max(options.context), max(options.batch_size)
        model, load_s = load_model(options, dtype, longest, most, needs_values=True)  # products of values are timed
        verdict = audit(model)
        ceiling = ReadBandwidth(model.device) if verdict.passed else None
        for pair in pairs(model, options.batch_size, options.context):
            found: dict[str, Any] = {"status": "refused", "reason": verdict.verdict}
            if ceiling is not None:
                found = times(pair, model.device, ceiling, options.warmup, options.repeat)
            named: dict[str, Any] = {
                "audit": verdict,
                "model": model.name,
                "dtype": model.runtime.dtype,
                "load_s": load_s,
            }
            yield KernelRow(kernel=pair.kernel, shape=pair.shape, bytes=pair.bytes, **named, **found)


def pairs(
    model: Model, batches: Sequence[int], contexts: Sequence[int], *, copies: int | None = None, compiled: bool = False
) -> Iterator[Pair]:
    """Every operation of a decode step but the smallest, at the shapes of a model, with random weights.

    Args:
        model: loaded.
        batches: rows of the products.
        contexts: tokens that attention reads.
        copies: of the weights; by default enough to exceed a cache many times.
        compiled: whether to add torch.compile's operations.
    """
    made: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    for case in cases(model.config):
        launches = copies or case.copies(model.dtype)
        weights = torch.randn(launches, case.outputs * case.matrices, case.width, **made)
        for rows_ in batches:
            run = operation(case, model.dtype, launches, rows_, model.device)
            x, norm = torch.randn(rows_, case.width, **made), torch.randn(case.width, **made)
            plain = partial(pytorch, case, x, norm)
            peers = {"torch_us": plain} | ({"torch_compiled_us": torch.compile(plain)} if compiled else {})
            yield Pair(
                case.kernel,
                f"{rows_} x {case.width} -> {case.outputs * case.matrices}",
                case.bytes(model.dtype),
                launches,
                _ready(partial(_each_copy, run, launches), model),
                {name: partial(each, peer, weights) for name, peer in peers.items()},
            )
    state, layers = new_state(model, 1), len(model.config.layers)
    for context in contexts:
        start(model, state, context - 1)
        size = (model.plan.bytes_per_token(context) - model.plan.bytes_per_token(0)) // layers
        ours = _ready(partial(_attend, model, state), model)
        yield Pair("decode_attention", f"context {context}", size, layers, ours, _attention(model, state, context))


def pytorch(case: Case, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a kernel computes, in PyTorch's operations, without adding branches and combining splits."""
    if case.kernel == "residual_linear":
        return F.linear(x, weight)
    product = F.linear(rms_norm_torch(x, norm, 1e-6), weight)
    if case.kernel == "gated_mlp":
        gate, up = product.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up
    return product.argmax(-1) if case.kernel == "lm_head_argmax" else product


def _attend(model: Model, state: DecodeState, ops: Ops) -> None:
    """The attention of every layer of a decode step."""
    config = model.config
    for index, (sizes, layer) in enumerate(zip(config.layers, model.weights.layers, strict=True)):
        ops.decode_attention(
            state.attended_of(sizes),
            state.cache.keys[index],
            state.cache.values[index],
            state.qkv_of(sizes),
            state.position,
            *model.rope.for_layer(index),
            heads=sizes.heads,
            scale=config.attention_scale,
            eps=config.rms_norm_eps,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            window=sizes.window,
            softcap=config.attention_softcap,
            splits=state.splits_of(sizes),
        )


def _attention(model: Model, state: DecodeState, context: int) -> dict[str, Run]:
    """PyTorch's fused attention over the caches of all layers; it has no softcap."""
    config = model.config
    if config.attention_softcap is not None:
        return {}
    first = config.layers[0]
    query = torch.randn(1, first.heads, 1, first.head_dim, device=model.device, dtype=model.dtype)
    caches = zip(state.cache.keys, state.cache.values, strict=True)
    held = [(keys[:, :, :context], values[:, :, :context]) for keys, values in caches]

    def attend(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
        F.scaled_dot_product_attention(query, *layer, scale=config.attention_scale, enable_gqa=True)

    return {"torch_us": partial(each, attend, held)}


def _each_copy(run: Callable[..., Any], copies: int, ops: Ops) -> None:
    each(partial(run, ops), range(copies), None)


def _ready(operations: Callable[[Ops], Any], model: Model) -> Run:
    """A function that runs these operations as a decode step does: on a CPU as compiled kernels, where there are
    any."""
    if model.device.type != "cpu" or cpu_calls.missing(model.dtype):
        return partial(operations, ops_of(model))
    return partial(cpu_calls.run, cpu_calls.captured(operations))


def times(pair: Pair, device: torch.device, ceiling: ReadBandwidth, warmup: int, repeat: int) -> dict[str, Any]:
    """A pair timed alternately, after a reading of the ceiling each time: the numbers of its row."""
    runs = {name: captured(run, device) for name, run in {"time_us": pair.ours, **pair.peers}.items()}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + warmup):
        for run in runs.values():
            run()
    read = []
    for _ in range(repeat):
        read.append(ceiling.gb_s())
        for name, run in runs.items():
            spent[name].append(device_seconds(run, device) * 1e6 / pair.launches)
    achieved = [pair.bytes / us / 1e3 for us in spent["time_us"]]
    samples = {name: Samples.of(values) for name, values in spent.items()}
    return {**samples, **ceiling_figures(achieved, read, datasheet_gb_s(device))}

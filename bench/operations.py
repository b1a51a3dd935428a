"""`bench kernels`: each operation at a model's shapes, beside PyTorch's operation for the same."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from runtime.bench.environment import datasheet_gb_s
from runtime.bench.gates import start
from runtime.bench.kernel_times import attention_of_all_layers, pytorch
from runtime.bench.measure import audit, ceiling_figures, load_model
from runtime.bench.records import KernelRow, Samples
from runtime.bench.timing import captured, each
from runtime.bench.tune import cases, operation
from runtime.cost.bandwidth import ReadBandwidth, device_seconds
from runtime.engine.graph import ops_of
from runtime.families.state import new_state
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.ops import Ops
from runtime.model.model import Model

Run = Callable[[], Any]


@dataclass(frozen=True)
class Pair:
    """An operation and PyTorch's for the same, each repeated over distinct weights or caches, so that none is
    found in a cache of the processor."""

    kernel: str
    shape: str
    bytes: int  # that one launch must read
    launches: int  # in one run
    ours: Run
    theirs: Run | None


def rows(options: Namespace) -> Iterator[KernelRow]:
    """A row for each matrix product and number of rows, and for attention at each context, in every dtype.

    Args:
        options: model, device, warmup, repeat; and lists: dtype, batch_size, context.
    """
    for dtype in options.dtype:
        model, _ = load_model(
            options.model,
            device=options.device,
            dtype=dtype,
            longest=max(options.context),
            batch=max(options.batch_size),
        )
        print(f"{model.name}, {model.runtime.dtype}: loaded, auditing", file=sys.stderr)
        verdict = audit(model)
        ceiling = ReadBandwidth(model.device) if verdict.passed else None
        for pair in pairs(model, options.batch_size, options.context):
            row = KernelRow(
                audit=verdict,
                model=model.name,
                dtype=model.runtime.dtype,
                kernel=pair.kernel,
                shape=pair.shape,
                bytes=pair.bytes,
            )
            if ceiling is not None:
                yield row.model_copy(update=_times(pair, model.device, ceiling, options.warmup, options.repeat))
            else:
                yield row.model_copy(update={"status": "refused"})


def pairs(model: Model, batches: Sequence[int], contexts: Sequence[int]) -> Iterator[Pair]:
    """Every operation of a decode step but the smallest, at the shapes of a model, with random weights."""
    made: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    for case in cases(model.config):
        copies = case.copies(model.dtype)
        weights = torch.randn(copies, case.outputs * case.matrices, case.width, **made)
        for rows_ in batches:
            run = operation(case, model.dtype, copies, rows_, model.device)
            x, norm = torch.randn(rows_, case.width, **made), torch.randn(case.width, **made)
            yield Pair(
                case.kernel,
                f"{rows_} x {case.width} -> {case.outputs * case.matrices}",
                case.bytes(model.dtype),
                copies,
                _ready(partial(_each_copy, run, copies), model),
                partial(each, partial(pytorch, case, x, norm), weights),
            )
    state, layers = new_state(model, 1), len(model.config.layers)
    for context in contexts:
        start(model, state, context - 1)
        size = (model.plan.bytes_per_token(context) - model.plan.bytes_per_token(0)) // layers
        ours = _ready(attention_of_all_layers(model, state), model)
        yield Pair("decode_attention", f"context {context}", size, layers, ours, _attention(model, state, context))


def _attention(model: Model, state: Any, context: int) -> Run | None:
    """PyTorch's fused attention over the caches of all layers; it has no softcap."""
    config = model.config
    if config.attention_softcap is not None:
        return None
    first = config.layers[0]
    query = torch.randn(1, first.heads, 1, first.head_dim, device=model.device, dtype=model.dtype)
    caches = zip(state.cache.keys, state.cache.values, strict=True)
    held = [(keys[:, :, :context], values[:, :, :context]) for keys, values in caches]

    def attend(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
        F.scaled_dot_product_attention(query, *layer, scale=config.attention_scale, enable_gqa=True)

    return partial(each, attend, held)


def _each_copy(run: Callable[..., Any], copies: int, ops: Ops) -> None:
    each(partial(run, ops), range(copies), None)


def _ready(operations: Callable[[Ops], Any], model: Model) -> Run:
    """What runs these operations as a decode step does: on a CPU as compiled kernels, where there are any."""
    if model.device.type != "cpu" or cpu_calls.missing(model.dtype):
        return partial(operations, ops_of(model))
    return partial(cpu_calls.run, cpu_calls.captured(operations))


def _times(pair: Pair, device: torch.device, ceiling: ReadBandwidth, warmup: int, repeat: int) -> dict[str, Any]:
    """A pair timed alternately, after a reading of the ceiling each time: the numbers of its row."""
    runs = [captured(run, device) for run in (pair.ours, pair.theirs) if run is not None]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + warmup):
        for run in runs:
            run()
    read = []
    for _ in range(repeat):
        read.append(ceiling.gb_s())
        for run, samples in zip(runs, times, strict=True):
            samples.append(device_seconds(run, device) * 1e6 / pair.launches)
    return {
        "time_us": Samples(values=tuple(times[0])),
        "torch_us": Samples(values=tuple(times[1])) if len(times) > 1 else None,
        **ceiling_figures([pair.bytes / spent / 1e3 for spent in times[0]], read, datasheet_gb_s(device)),
    }

"""Where a token's time goes: the operations of one decode step on a clock, and the timeline of a step on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from runtime.bench.gates import start
from runtime.bench.records import Part
from runtime.bench.scale import Scale
from runtime.bench.timing import synchronize
from runtime.engine.decode import decode_step, stepper
from runtime.engine.graph import ops_of
from runtime.families.state import DecodeState, new_state
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.operation import Operation
from runtime.kernels.ops import Ops
from runtime.model.model import Model
from runtime.model.threads import torch_threads

STEPS = 5  # timed, after one that is not

Spent = dict[str, list[float]]  # per kind of operation the seconds of each launch
Event = tuple[str, float, float]  # of a kernel or operation its name, start and end, in microseconds


def step_parts(model: Model, batch: int, context: int) -> tuple[Part, ...]:
    """The time of each kind of operation in a decode step.

    On a GPU these are the kernels of the replayed graph as the profiler sees them, which slows short ones down; on a
    CPU each compiled kernel on its own or, where there are none, the operations of an eager step.

    Args:
        model: loaded.
        batch: rows, up to its max_batch.
        context: tokens in every row's cache, of made-up content.
    """
    state = new_state(model, batch)
    step = stepper(model, state)
    take = _profiled if model.device.type == "cuda" else _called if state.graphs else _run
    steps = []
    for _ in range(STEPS + 1):
        start(model, state, context)
        steps.append(take(model, state, step))
    kinds = sorted({kind for spent in steps for kind in spent})
    return tuple(
        Part(
            name=kind,
            time_us=statistics.median(sum(spent.get(kind, [0.0])) for spent in steps[1:]) * 1e6,
            launches=len(steps[-1].get(kind, [])),
        )
        for kind in kinds
    )


def _called(model: Model, state: DecodeState, step: Callable[[], None]) -> Spent:
    """The compiled kernels of a captured step on a CPU, each run by itself."""
    calls = cpu_calls.captured(lambda ops: decode_step(ops, model, state))
    spent: Spent = {}
    for call in calls:
        alone = cpu_calls.Calls([call])
        alone.compile()
        started = time.perf_counter()
        cpu_calls.run(alone)
        spent.setdefault(call[0].__name__, []).append(time.perf_counter() - started)
    return spent


class TimedOps(Ops):
    """Another backend with a clock around each operation."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.spent: Spent = {}

    def run(self, operation: Operation) -> None:
        started = time.perf_counter()
        self._ops.run(operation)
        self.spent.setdefault(operation.name, []).append(time.perf_counter() - started)


def _run(model: Model, state: DecodeState, step: Callable[[], None]) -> Spent:
    """The operations of an eager step on a CPU."""
    ops = TimedOps(ops_of(model))
    with torch_threads(model.runtime.threads):
        decode_step(ops, model, state)
    return ops.spent


def _profiled(model: Model, state: DecodeState, step: Callable[[], None]) -> Spent:
    step()
    spent: Spent = {}
    for name, began, ended in profiled(step, model.device):
        spent.setdefault(name.removesuffix("_kernel"), []).append((ended - began) / 1e6)
    return spent


def profiled(step: Callable[[], Any], device: torch.device) -> list[Event]:
    """What a step runs, in order of start time, as the profiler sees it, which slows short kernels down: on a GPU its
    kernels, on a CPU PyTorch's operations."""
    on_gpu = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        step()
        synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans = ((event.name, event.time_range) for event in seen.events() if event.device_type == wanted)
    found = [(name, span.start, span.end) for name, span in spans if span.elapsed_us() > 0]
    return sorted(found, key=lambda event: event[1])


def timeline(scale: Scale, name: str) -> dict[str, Any]:
    """One replayed step of a model: per kernel its start, duration and the gap before it, in microseconds, and the sum
    per kernel. A negative gap is overlap by dependent launch. On a CPU the events are the operations of an eager step.
    """
    model = scale.model(name)
    state = new_state(model, 1)
    start(model, state, scale.prompt)
    step = stepper(model, state)
    step()
    events = profiled(step, scale.device)
    kernels: list[dict[str, Any]] = []
    parts: dict[str, float] = {}
    first = end = events[0][1]
    for kernel, began, ended in events:
        spent = ended - began
        kernels.append({"kernel": kernel, "start_us": began - first, "duration_us": spent, "gap_us": began - end})
        parts[kernel] = parts.get(kernel, 0.0) + spent
        end = max(end, ended)
    return {"model": name, "context": scale.prompt, "parts_us": parts, "kernels": kernels}

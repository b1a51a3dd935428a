"""Where a token's time goes: the operations of one decode step on a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from runtime import kernels
from runtime.bench.gates import start
from runtime.bench.records import Part
from runtime.engine.decode import decode_step, stepper
from runtime.families.state import DecodeState, new_state
from runtime.kernels.cpu import calls as cpu_calls
from runtime.model.model import Model

STEPS = 5  # timed, after one that is not

Spent = dict[str, list[float]]  # per kind of operation the seconds of each launch


def step_parts(model: Model, batch: int, context: int) -> tuple[Part, ...]:
    """The time of each kind of operation in a decode step.

    On a GPU these are the kernels of the replayed graph as the profiler sees them, which slows short ones down; on a
    CPU the compiled kernels one by one or, where there are none, the launchers of an eager step.

    Args:
        model: loaded.
        batch: rows, up to its max_batch.
        context: tokens in every row's cache, of made-up content.
    """
    state = new_state(model, batch)
    step = stepper(model, state)
    take = _profiled if model.device.type == "cuda" else _called if state.graphs else _launched
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
    calls = cpu_calls.captured(lambda: decode_step(model, state))
    spent: Spent = {}
    for call in calls:
        alone = cpu_calls.Calls([call])
        alone.compile()
        started = time.perf_counter()
        cpu_calls.run(alone)
        spent.setdefault(call[0].__name__, []).append(time.perf_counter() - started)
    return spent


def _launched(model: Model, state: DecodeState, step: Callable[[], None]) -> Spent:
    spent: Spent = {}
    with _timed_launchers(spent):
        step()
    return spent


@contextmanager
def _timed_launchers(spent: Spent) -> Iterator[None]:
    """Puts a clock around every launcher while it is open: the models find them by name in `runtime.kernels`."""

    def timed(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launcher)
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = launcher(*arguments, **options)
            spent.setdefault(name, []).append(time.perf_counter() - started)
            return result

        return run

    launchers = {name: getattr(kernels, name) for name in kernels.__all__}
    try:
        for name, launcher in launchers.items():
            setattr(kernels, name, timed(name, launcher))
        yield
    finally:
        for name, launcher in launchers.items():
            setattr(kernels, name, launcher)


def _profiled(model: Model, state: DecodeState, step: Callable[[], None]) -> Spent:
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize(model.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize(model.device)
    spent: Spent = {}
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent.setdefault(event.name.removesuffix("_kernel"), []).append(event.time_range.elapsed_us() / 1e6)
    return spent

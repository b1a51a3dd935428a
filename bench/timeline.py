"""The timeline of one decode step: when each kernel runs, and the gaps between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from runtime.bench.gates import start
from runtime.bench.scale import Scale
from runtime.bench.timing import synchronize
from runtime.engine.decode import stepper
from runtime.families.state import new_state

Event = tuple[str, float, float]  # of a kernel or operation its name, start and end, in microseconds


def profiled(step: Callable[[], Any], device: torch.device) -> list[Event]:
    """What a step runs, in the order of its starts, as the profiler sees it, which slows short kernels down: on a GPU
    its kernels, on a CPU PyTorch's operations."""
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

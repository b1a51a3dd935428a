"""The timeline of one decode step: when each kernel runs, and the gaps between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from runtime.bench.gates import start
from runtime.bench.scale import Scale
from runtime.bench.timing import synchronize
from runtime.engine.decode import stepper
from runtime.families.state import new_state


def timeline(scale: Scale, name: str) -> dict[str, Any]:
    """One replayed step of a model: per kernel its start, duration and the gap before it, in microseconds, and the sum
    per kernel. A negative gap is overlap by dependent launch. The profiler itself slows short kernels down.
    On a CPU the events are the operations of an eager step.
    """
    model = scale.model(name)
    state = new_state(model, 1)
    start(model, state, scale.prompt)
    step = stepper(model, state)
    step()
    synchronize(scale.device)
    cuda = scale.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        step()
        synchronize(scale.device)
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = sorted(
        (event for event in profiled.events() if event.device_type == wanted and event.time_range.elapsed_us() > 0),
        key=lambda event: event.time_range.start,
    )
    kernels, end = [], None
    for event in events:
        began = event.time_range.start
        kernels.append(
            {
                "kernel": event.name,
                "start_us": began - events[0].time_range.start,
                "duration_us": event.time_range.elapsed_us(),
                "gap_us": 0.0 if end is None else began - end,
            }
        )
        end = event.time_range.end if end is None else max(end, event.time_range.end)
    parts: dict[str, float] = {}
    for kernel in kernels:
        parts[kernel["kernel"]] = parts.get(kernel["kernel"], 0.0) + kernel["duration_us"]
    return {"model": name, "context": scale.prompt, "parts_us": parts, "kernels": kernels}


def draw(found: dict[str, Any], path: Path) -> None:
    """A timeline as a picture: a bar per kernel, a row per kind of kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(found["parts_us"])
    figure, axes = pyplot.subplots(figsize=(14, 1 + 0.35 * len(names)), layout="constrained")
    for row, name in enumerate(names):
        bars = [(k["start_us"], k["duration_us"]) for k in found["kernels"] if k["kernel"] == name]
        axes.broken_barh(bars, (row - 0.4, 0.8))
    axes.set_yticks(range(len(names)), [f"{name[:40]}  {found['parts_us'][name]:.0f} us" for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("us")
    axes.set_title(f"one decode step of {found['model']}, context {found['context']}")
    figure.savefig(path)
    pyplot.close(figure)

"""Timing: device time on a GPU, wall-clock time on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from runtime.cost.bandwidth import device_seconds
from runtime.kernels.launch import current


def time_us(run: Callable[[], Any], device: torch.device, repeats: int = 9) -> float:
    """Median time of what `run` launches, in microseconds; on a GPU it is captured and replayed as a graph."""
    return statistics.median(samples_us(captured(run, device), device, repeats))


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """On a GPU, a function that replays a graph of `run`, which keeps the host out of the measurement; else `run`."""
    if device.type != "cuda":
        return run
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with current(device), torch.cuda.stream(stream):
        run()
        with torch.cuda.graph(graph, stream=stream):
            run()
    return graph.replay


def samples_us(run: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    """Sorted times of `count` runs after some untimed ones, in microseconds."""
    warming = 3 if device.type == "cuda" else 1
    samples = [device_seconds(run, device) * 1e6 for _ in range(warming + count)]
    return sorted(samples[warming:])


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of one run, the device's work included."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def each(run: Callable[..., Any], items: Iterable[Any], *rest: Any) -> None:
    """Calls a function on every item."""
    for item in items:
        run(item, *rest)

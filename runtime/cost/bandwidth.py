"""How fast this machine reads memory: the ceiling of decoding, where every step reads every weight once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.launch import current
from runtime.model import huge_pages

BUFFER_BYTES = 2**30  # well past any cache
WIDTH = 1024  # of the weight matrix that the buffer is taken for


def read_bandwidth_gb_s(device: torch.device, *, buffer_bytes: int = BUFFER_BYTES, repeat: int = 10) -> float:
    """Measure the read bandwidth of a device with all its threads.

    Args:
        device: where to measure.
        buffer_bytes: size of the buffer that is read, whole rows of 4 KiB; it is allocated here and freed again.
        repeat: measurements of each kind, of which the fastest counts: other load only slows them down.

    Returns:
        10^9 bytes per second.
    """
    # In huge pages, as weights are: they are read a sixth faster. Filled with ones: memory that was never written may
    # be one shared page, read from the cache.
    buffer = huge_pages.empty(buffer_bytes, device).view(torch.float32).fill_(1)
    readers = list(_readers(buffer))
    for read in readers:
        read()
    return buffer_bytes / min(device_seconds(read, device) for _ in range(repeat) for read in readers) / 1e9


def _readers(buffer: torch.Tensor) -> Iterator[Callable[[], Any]]:
    """Functions that read a buffer once: on a GPU its sum. On a CPU its dot product with itself, the fastest of torch's
    reductions, and decoding's own product of a row and a matrix, so that decoding cannot exceed the ceiling."""
    if buffer.device.type == "cuda":
        yield buffer.sum
        return
    yield lambda: buffer.dot(buffer)
    if cpu_calls.missing(buffer.dtype) is None:
        weight = buffer.view(-1, WIDTH)
        out, ones = buffer.new_empty(1, len(weight)), buffer.new_ones(1, WIDTH)
        calls = cpu_calls.captured(lambda ops: ops.residual_linear(out, ones, weight))
        yield lambda: cpu_calls.run(calls)


def device_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The time of one run: on a GPU the device's own, on a CPU the clock's."""
    if device.type == "cuda":
        with current(device):
            started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            started.record()
            run()
            ended.record()
            ended.synchronize()
        return started.elapsed_time(ended) / 1e3
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s

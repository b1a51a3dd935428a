"""How fast this machine reads memory: the ceiling of decoding, where every step reads every weight once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from runtime import huge_pages

BUFFER_BYTES = 2**30  # well past any cache


def read_bandwidth_gb_s(device: torch.device, *, buffer_bytes: int = BUFFER_BYTES, repeat: int = 10) -> float:
    """Measure the read bandwidth of a device with all its threads.

    Args:
        device: where to measure.
        buffer_bytes: size of the buffer that is read; it is allocated here and freed again.
        repeat: readings, of which the best counts: what else runs can only slow one down.

    Returns:
        10^9 bytes per second.
    """
    # In huge pages, as weights are: they are read a sixth faster. Filled with ones: memory that was never written may
    # be one shared page, read from the cache.
    buffer = huge_pages.empty(buffer_bytes, device).view(torch.float32).fill_(1)
    # On CPUs a dot product of the buffer with itself reads it once and was the fastest of the reductions in torch.
    read = buffer.sum if device.type == "cuda" else lambda: buffer.dot(buffer)
    read()
    return buffer_bytes / min(device_seconds(read, device) for _ in range(repeat)) / 1e9


def device_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The time of one run: on a GPU the device's own, on a CPU the clock's."""
    if device.type == "cuda":
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        run()
        ended.record()
        ended.synchronize()
        return started.elapsed_time(ended) / 1e3
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s

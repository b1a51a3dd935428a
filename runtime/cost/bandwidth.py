"""How fast this machine reads memory: the ceiling of decoding, where every step reads every weight once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.launch import current
from runtime.model import huge_pages

CPU_BYTES, GPU_BYTES = 2**29, 2**32  # of the buffer that is read, at most
PASSES = 4
WIDTH = 1024  # of the weight matrix that the buffer is taken for
GPU_GRIDS = ((1056, 2048), (4096, 4096), (16384, 8192))  # programs, elements of a load

Reader = tuple[int, Callable[[], Any]]  # bytes that it reads, and what reads them


class ReadBandwidth:
    """A device's read bandwidth, with a buffer that is reused from reading to reading.

    On a shared machine bandwidth changes within minutes, so each run is compared with a reading directly before it, and
    a reading must be cheap. 512 MiB are many times a CPU's last-level cache and are read in about the time of a small
    model's decode step, 13 ms at 40 GB/s; four passes by each of two readers take 0.1 s, and the fastest counts, since
    other load only slows them down. A GPU reads 4 GiB or a sixteenth of its memory, twelve times; each pass takes a
    millisecond, beside which the few microseconds of a launch are nothing.

    Args:
        device: where to measure, with all its threads.
        buffer_bytes: size of the buffer, whole rows of 4 KiB.
        readers: gives the readers of a buffer, float32 [elements]; by default those of the device.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        buffer_bytes: int | None = None,
        readers: Callable[[torch.Tensor], Iterator[Reader]] | None = None,
    ) -> None:
        self._device = device
        size = buffer_bytes or _size(device)
        # In huge pages, as weights are: they are read a sixth faster. Filled with ones: memory that was never written
        # may be one shared page, read from the cache.
        buffer = huge_pages.zeros(size, device).view(torch.float32).fill_(1)
        self._readers = list((readers or (gpu_readers if device.type == "cuda" else cpu_readers))(buffer))
        with current(device):
            for _, read in self._readers:
                read()

    def gb_s(self, passes: int = PASSES) -> float:
        """One reading, in 10^9 bytes per second: the fastest of `passes` by each reader."""
        return max(
            size / device_seconds(read, self._device) / 1e9 for size, read in self._readers for _ in range(passes)
        )


def _size(device: torch.device) -> int:
    """Bytes of the buffer."""
    if device.type != "cuda":
        return CPU_BYTES
    return min(GPU_BYTES, torch.cuda.get_device_properties(device).total_memory // 16 // 2**20 * 2**20)


def read_bandwidth_gb_s(device: torch.device, *, buffer_bytes: int | None = None, repeat: int = 10) -> float:
    """One longer reading of a device, as `ReadBandwidth`'s, in 10^9 bytes per second."""
    return ReadBandwidth(device, buffer_bytes=buffer_bytes).gb_s(repeat)


def definition(device: torch.device) -> str:
    """What `ReadBandwidth` measures on a device, in words."""
    if device.type == "cuda":
        grids = f"the fastest of {PASSES} passes with each of {len(GPU_GRIDS)} grids"
        return f"a Triton kernel that reads up to {GPU_BYTES >> 30} GiB, {grids}"
    own = "" if cpu_calls.missing(torch.float32) else " and decoding's own product of a row and a matrix"
    return f"torch's dot product{own} over {CPU_BYTES >> 20} MiB, the fastest of {PASSES} passes of each"


def cpu_readers(buffer: torch.Tensor) -> Iterator[Reader]:
    """What reads a buffer: its dot product with itself, the fastest of torch's reductions, and decoding's own product
    of a row and a matrix, so that decoding cannot exceed the ceiling."""
    yield buffer.nbytes, lambda: buffer.dot(buffer)
    if cpu_calls.missing(buffer.dtype) is None:
        weight = buffer.view(-1, WIDTH)
        out, ones = buffer.new_empty(1, len(weight)), buffer.new_ones(1, WIDTH)
        calls = cpu_calls.captured(lambda ops: ops.residual_linear(out, ones, weight))
        yield buffer.nbytes, lambda: cpu_calls.run(calls)


def gpu_readers(buffer: torch.Tensor, grids: tuple[tuple[int, int], ...] = GPU_GRIDS) -> Iterator[Reader]:
    """Launches of `read_kernel` over a buffer, float32 [elements], one for each grid."""
    words = buffer.view(torch.int32)
    for programs, block in grids:
        out, elements = words.new_empty(programs), len(words) // programs // block * block
        launch = partial(read_kernel[(programs,)], out, words, elements, BLOCK=block, num_warps=4)
        yield 4 * elements * programs, launch


@triton.jit
def read_kernel(out_ptr, x_ptr, elements, BLOCK: tl.constexpr):
    # One program reads one contiguous slice and stores one word, so that the compiler cannot drop the loads.
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, elements, BLOCK):
        total ^= tl.load(x_ptr + program.to(tl.int64) * elements + offset + tl.arange(0, BLOCK))
    tl.store(out_ptr + program, tl.max(total, axis=0))


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

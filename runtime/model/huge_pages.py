"""Memory for weights and the KV cache, in huge pages on a CPU: decoding reads it all for every token, and one TLB entry
then covers 2 MiB instead of 4 KiB.

Linux grants huge pages on request (madvise), unless configured to always or never use them.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

HUGE_PAGE = 2**21  # bytes
ALIGNMENT = 256  # bytes; enough for any kernel's loads
_SMALLEST_PAGE = 4096  # bytes
_CLEARED_AT_ONCE = 1 << 30  # bytes, cleared without holding the GIL: a second or so


def zeros(size: int, device: torch.device) -> torch.Tensor:
    """Zeros, uint8 [size], in huge pages on a CPU whose system has them. The system provides each page on first use."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8, device=device)
    mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a Linux built without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    padded = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -padded.data_ptr() % HUGE_PAGE
    return padded[start : start + size]


class Slab:
    """One allocation, from which tensors are taken in turn."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        """Allocates memory for tensors of these shapes."""
        self._dtype, self._used = dtype, 0
        self._bytes = zeros(sum(map(self._size, shapes)), device)

    @property
    def memory(self) -> torch.Tensor:
        """All of it, [elements]."""
        return self._bytes.view(self._dtype)

    @contextmanager
    def cleared_meanwhile(self) -> Iterator[None]:
        """Has the system provide and clear the memory on a thread while the context's body runs: on a CPU, 240 MB take
        0.02 to 0.6 s. Pages not reached by the end of the context are left to their first use."""
        done = threading.Event()

        def clear() -> None:
            for start in range(0, len(self._bytes), _CLEARED_AT_ONCE):
                if done.is_set():
                    break
                self._bytes[start : start + _CLEARED_AT_ONCE].numpy()[::_SMALLEST_PAGE] = 0

        thread = threading.Thread(target=clear, daemon=True)
        if self._bytes.device.type == "cpu":
            with suppress(RuntimeError):  # the system refuses more threads
                thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.ident is not None:
                thread.join()

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A contiguous tensor of one of the shapes, zeros until it is written."""
        start, self._used = self._used, self._used + self._size(shape)
        data = self._bytes[start : start + torch.Size(shape).numel() * self._dtype.itemsize]
        # Its own storage, so that pickling one tensor does not write the whole slab; an empty one has no buffer.
        if data.device.type == "cpu" and len(data):
            data = torch.frombuffer(data.numpy(), dtype=torch.uint8)
        return data.view(self._dtype).view(shape)

    def _size(self, shape: tuple[int, ...]) -> int:
        return -(-torch.Size(shape).numel() * self._dtype.itemsize // ALIGNMENT) * ALIGNMENT

"""Copying tokens from the device to the host without stopping the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Readback(Protocol):
    """Where the engine gets its tokens from, in the order of its requests."""

    def request(self, tokens: Sequence[Any]) -> None:
        """Asks for what tensors [rows] int64 (on a CPU also arrays) will hold once all that is launched has run."""

    def take(self) -> list[list[int]]:
        """Waits for the oldest request, and returns its values."""


class PinnedReadback:
    """Copies tokens to pinned memory, on a stream of its own.

    Args:
        device: a GPU.
        requests: most requests pending at a time.
        steps, rows: most tensors in a request, and most elements in one of them.
    """

    def __init__(self, device: torch.device, requests: int, steps: int, rows: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pinned = torch.empty(requests, steps, rows, dtype=torch.int64, pin_memory=True, device="cpu")
        self._free = deque(range(requests))
        self._waiting: deque[tuple[int, list[torch.Tensor], torch.cuda.Event]] = deque()

    def request(self, tokens: Sequence[torch.Tensor]) -> None:
        place = self._free.popleft()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, values in zip(self._pinned[place], tokens, strict=False):
                target[: len(values)].copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._waiting.append((place, list(tokens), copied))  # the tensors must stay alive until they are copied

    def take(self) -> list[list[int]]:
        place, tokens, copied = self._waiting.popleft()
        copied.synchronize()
        self._free.append(place)
        return [copy[: len(values)].tolist() for copy, values in zip(self._pinned[place], tokens, strict=False)]


def readback_for(device: torch.device, requests: int, steps: int, rows: int) -> Readback:
    """The readback for a device; the numbers are as in PinnedReadback."""
    return PinnedReadback(device, requests, steps, rows) if device.type == "cuda" else HostReadback()


class HostReadback:
    """Tokens that are on the host already."""

    def __init__(self) -> None:
        self._waiting: deque[list[list[int]]] = deque()

    def request(self, tokens: Sequence[Any]) -> None:
        self._waiting.append([values.tolist() for values in tokens])

    def take(self) -> list[list[int]]:
        return self._waiting.popleft()

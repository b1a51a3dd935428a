"""Copying tokens from the device to the host without stopping the device."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch


class Readback(Protocol):
    """Where the host's loop gets its tokens from, in the order of its requests."""

    def request(self, first: int, count: int) -> None:
        """Asks for the tokens of `count` launched steps, from step number `first` on."""

    def take(self) -> list[list[int]]:
        """Waits for the oldest request, and returns one list of the rows' tokens per step."""


class PinnedReadback:
    """Copies of the ring of emitted tokens to pinned memory, on a stream of their own.

    Args:
        emitted: [ring, rows] int64 on the device: the tokens of step s in slot s % ring.
        requests: most requests pending at a time.
        steps: most steps in one request.
    """

    def __init__(self, emitted: torch.Tensor, requests: int, steps: int) -> None:
        self._emitted = emitted
        self._stream = torch.cuda.Stream(emitted.device)
        self._pinned = torch.empty(requests, steps, emitted.shape[1], dtype=torch.int64, pin_memory=True)
        self._free = deque(range(requests))
        self._waiting: deque[tuple[int, int, torch.cuda.Event]] = deque()

    def request(self, first: int, count: int) -> None:
        place = self._free.popleft()
        self._stream.wait_stream(torch.cuda.current_stream(self._emitted.device))
        with torch.cuda.stream(self._stream):
            for step in range(count):
                slot = self._emitted[(first + step) % len(self._emitted)]
                self._pinned[place, step].copy_(slot, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._waiting.append((place, count, copied))

    def take(self) -> list[list[int]]:
        place, count, copied = self._waiting.popleft()
        copied.synchronize()
        self._free.append(place)
        return self._pinned[place, :count].tolist()

"""A backup of what guessed tokens overwrite in the rings of one sequence.

In a sliding layer a token's key takes the slot of the key that leaves the window at that position. If a guess turns out
wrong, what its key has overwritten may still be in the window of the tokens that come instead, so it is put back.
"""

from __future__ import annotations

import numpy as np
import torch

from runtime.families.kv_cache import KVCache


class RingBackup:
    """Copies of a few slots of every ring.

    Args:
        cache: on a CPU.
        most: positions that are kept at a time, no more than any ring has slots.
    """

    def __init__(self, cache: KVCache, most: int) -> None:
        # As bytes, since numpy has no bfloat16. Between two steps slicing an array takes a fraction of a tensor's time.
        self._rings: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # by their slots: a ring and its copy
        for buffers in (cache.keys, cache.values):
            for buffer, window in zip(buffers, cache.windows, strict=True):
                if window is not None:
                    ring = buffer.view(torch.uint8).numpy()  # [batch, kv_heads, slots, bytes]
                    copy = np.empty((ring.shape[1], most, ring.shape[3]), np.uint8)
                    self._rings.setdefault(ring.shape[2], []).append((ring, copy))
        self._row = self._start = self._end = 0

    def keep(self, row: int, start: int, end: int) -> None:
        """Keeps what positions start to end - 1 of a sequence are about to overwrite."""
        self._row, self._start, self._end = row, start, end
        for slots, rings in self._rings.items():
            for copied, ringed in self._spans(slots, start):
                for ring, copy in rings:
                    copy[:, copied] = ring[row, :, ringed]

    def restore(self, start: int) -> None:
        """Puts back what positions from `start` on have overwritten."""
        for slots, rings in self._rings.items():
            for copied, ringed in self._spans(slots, start):
                for ring, copy in rings:
                    ring[self._row, :, ringed] = copy[:, copied]

    def _spans(self, slots: int, start: int) -> list[tuple[slice, slice]]:
        """Where the keys that positions from `start` on overwrite lie in a copy and in a ring of so many slots: up to
        two pairs of ranges. The first `slots` positions overwrite nothing."""
        start, spans = max(start, slots), []
        while start < self._end:
            slot = start % slots
            count = min(self._end - start, slots - slot)
            place = start - self._start
            spans.append((slice(place, place + count), slice(slot, slot + count)))
            start += count
        return spans

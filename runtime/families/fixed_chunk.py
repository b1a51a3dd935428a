"""A chunk whose operations, shapes and addresses do not depend on the prompt: what a CUDA graph can hold.

Row, start and number of tokens are read from the device, and a chunk is padded to one of a few lengths. A padded place
gets the key and value of the last real token, in attention and in the cache, so nothing computed from padding ever
meets a real token, and storing it writes the same bits to the same slot once more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from runtime.families.chunk import BaseChunk
from runtime.families.kv_cache import KVCache
from runtime.model.config import RopeConfig
from runtime.model.model import Model


class Places(NamedTuple):
    """Where a chunk meets the slots of the layers of one window."""

    empty: torch.Tensor  # [past] bool: the first slots that hold nothing yet
    kept: torch.Tensor  # [seq] int64: the tokens that stay in the cache, some repeatedly
    slot: torch.Tensor  # [seq] int64: where they go
    mask: torch.Tensor | None  # [1, 1, seq, past + seq] bool; None for causal attention to the chunk alone

    def __repr__(self) -> str:
        return f"Places({len(self.slot)} of {len(self.empty)} slots)"


class FixedChunk(BaseChunk):
    """The positions [start, start + count) of the sequence in one row of the cache, padded to `seq` places.

    Args:
        model, cache: the model, the cache of all rows.
        row, start, count: [1] int64 on the device; count is 1 to seq.
        seq: places.
        past: 0 for the first chunk of a prompt, or at least its start: how many slots of a full layer are looked at.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        row: torch.Tensor,
        start: torch.Tensor,
        count: torch.Tensor,
        seq: int,
        past: int,
    ) -> None:
        self.model, self.cache, self.seq = model, cache, seq
        self._row, self._start, self._count, self._past = row, start, count, past
        self._place = torch.arange(seq, device=row.device)
        self._real = torch.minimum(self._place, count - 1)
        self._tables: dict[RopeConfig, tuple[torch.Tensor, torch.Tensor]] = {}
        self._places: dict[int | None, Places] = {}

    def _angles(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rope = self.model.config.rope[index]
        if rope not in self._tables:
            cos, sin = self.model.rope.for_layer(index)
            position = self._start + self._real  # a padded place could lie past the table
            self._tables[rope] = cos.index_select(0, position), sin.index_select(0, position)
        return self._tables[rope]

    def _extend(
        self, index: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        window = self.model.config.windows[index]
        if window not in self._places:
            self._places[window] = self._find_places(index, window)
        empty, kept, slot, mask = self._places[window]
        k, v = k.index_select(2, self._real), v.index_select(2, self._real)
        keys, values = self.cache.extend_at(index, self._row, k, v, empty=empty, kept=kept, slot=slot)
        return keys, values, mask

    def _find_places(self, index: int, window: int | None) -> Places:
        slots = self.cache.keys[index].shape[2]
        held = self.cache.held(index, self._start, self._past)
        # Of a chunk longer than the ring only the end stays; what is older repeats the oldest of it.
        kept = torch.maximum(self._real, self._count - slots)
        slot = (self._start + kept) % slots
        fits = window is None or window >= self.seq
        if not self._past and fits and self.model.config.attention_softcap is None:
            return Places(held < 0, kept, slot, None)
        query = (self._start + self._place)[:, None]
        key = torch.cat((held, self._start + self._place))
        mask = (key >= 0) & (key <= query)
        if window is not None:
            mask &= key > query - window
        return Places(held < 0, kept, slot, mask[None, None])

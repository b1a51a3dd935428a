"""A chunk whose operations, shapes and addresses do not depend on the prompt, so that a CUDA graph can hold it.

Row, start and token count are read from the device, and a chunk is padded to one of a few lengths. Padding takes the
key and value of the last real token, in attention and in the cache: no real token sees anything computed from padding,
and storing it rewrites the same bits to the same slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from runtime.families.chunk import BaseChunk
from runtime.families.kv_cache import KVCache
from runtime.model.model import Model
from runtime.model.rope_config import RopeConfig


class ChunkSlots(NamedTuple):
    """How a chunk uses the cache slots of layers with the same window."""

    empty: torch.Tensor  # [past] bool: which of the first slots hold no key that the chunk sees
    tokens: torch.Tensor  # [seq] int64: the tokens to cache, some repeated
    slot: torch.Tensor  # [seq] int64: their slots
    mask: torch.Tensor | None  # [1, 1, seq, past + seq] bool; None for causal attention to the chunk alone

    def __repr__(self) -> str:
        return f"ChunkSlots({len(self.slot)} of {len(self.empty)} slots)"


class FixedChunk(BaseChunk):
    """The positions [start, start + count) of the sequence in one row of the cache, padded to `seq` tokens.

    Args:
        model, cache: the model, the cache of all rows.
        row, start, count: [1] int64 on the device; count is 1 to seq.
        seq: padded number of tokens.
        past: slots of a full-attention layer to attend to: 0 for the first chunk of a prompt, else at least `start`.
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
        self._index = torch.arange(seq, device=row.device)
        self._real = torch.minimum(self._index, count - 1)  # padding repeats the last real token
        self._tables: dict[tuple[RopeConfig, int], tuple[torch.Tensor, torch.Tensor]] = {}  # by rope and head_dim
        self._slots: dict[int | None, ChunkSlots] = {}

    def _angles(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.model.config.layers[index]
        key = layer.rope, layer.head_dim
        if key not in self._tables:
            cos, sin = self.model.rope.for_layer(index)
            position = self._start + self._real  # padding could be past the table's end
            self._tables[key] = cos.index_select(0, position), sin.index_select(0, position)
        return self._tables[key]

    def _extend(
        self, index: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        window = self.model.config.layers[index].window
        if window not in self._slots:
            self._slots[window] = self._plan_slots(index, window)
        empty, tokens, slot, mask = self._slots[window]
        k, v = k.index_select(2, self._real), v.index_select(2, self._real)
        keys, values = self.cache.extend_at(index, self._row, k, v, empty=empty, tokens=tokens, slot=slot)
        return keys, values, mask

    def _plan_slots(self, index: int, window: int | None) -> ChunkSlots:
        slots = self.cache.keys[index].shape[2]
        past_positions = self.cache.slot_positions(index, self._start, self._past)
        empty = past_positions < 0
        if window is not None:
            empty |= past_positions <= self._start - window  # a step may have overwritten it: see Prefill
        # Of a chunk longer than the ring, only the last `slots` tokens stay; earlier ones repeat the oldest of those.
        tokens = torch.maximum(self._real, self._count - slots)
        slot = (self._start + tokens) % slots
        fits = window is None or window >= self.seq
        if not self._past and fits and self.model.config.attention_softcap is None:
            return ChunkSlots(empty, tokens, slot, None)
        query = (self._start + self._index)[:, None]
        key = torch.cat((past_positions, self._start + self._index))
        mask = (key >= 0) & (key <= query)
        if window is not None:
            mask &= key > query - window
        return ChunkSlots(empty, tokens, slot, mask[None, None])

"""The static KV cache.

A full-attention layer has a slot for each of max_seq_len positions. A sliding layer has at most as many slots as its
window, used as a ring: position p goes to slot p % slots, over the key that has just left the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from runtime.kernels.attention import history
from runtime.model.config import ModelConfig
from runtime.model.huge_pages import Slab


@dataclass(frozen=True, repr=False)
class KVCache:
    """Keys and values of every layer, each [batch, kv_heads, slots, head_dim] of that layer."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    windows: tuple[int | None, ...]
    memory: torch.Tensor  # [elements], which all of them lie in

    def __repr__(self) -> str:
        size = sum(buffer.nbytes for buffer in (*self.keys, *self.values))
        return f"KVCache({len(self.keys)} layers, {len(self.keys[0])} rows, {size:,} bytes)"

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Allocates zeroed buffers for `batch` sequences of up to `max_seq_len` tokens, in one allocation; on a CPU the
        system provides its pages on first use."""
        shapes = [(batch, layer.kv_heads, layer.slots(max_seq_len), layer.head_dim) for layer in config.layers]
        slab = Slab(shapes * 2, dtype, device)
        keys, values = (tuple(slab.take(shape) for shape in shapes) for _ in range(2))
        return cls(keys, values, tuple(layer.window for layer in config.layers), slab.memory)

    def extend(
        self, layer: int, row: int, start: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a chunk of one sequence and returns all keys and values that its queries may attend to.

        Args:
            layer, row: index of the layer and of the sequence.
            start: position of the chunk's first token; earlier positions are cached already.
            k, v: [1, kv_heads, seq, head_dim], the chunk's keys (after rotary embedding) and values.

        Returns:
            Keys and values [1, kv_heads, keys, head_dim], oldest first, ending with the chunk: all positions so far, or
            in a sliding layer the chunk and the `window` positions before it, the first of them zeroed: no query sees
            it, but it makes blocks of keys begin where they would if the prompt ran in one pass, if chunk and window
            are multiples of a block.
        """
        return (
            self._extend(self.keys[layer][row : row + 1], layer, start, k),
            self._extend(self.values[layer][row : row + 1], layer, start, v),
        )

    def spans(self, layer: int, start: int, end: int) -> Iterator[tuple[slice, slice]]:
        """Where a layer keeps positions start to end - 1, at most as many as it has slots: one or two pairs of a range
        of positions and the range of their slots."""
        slots = self.keys[layer].shape[2]
        while start < end:
            slot = start % slots
            count = min(end - start, slots - slot)
            yield slice(start, start + count), slice(slot, slot + count)
            start += count

    def slot_positions(self, layer: int, start: torch.Tensor, past: int) -> torch.Tensor:
        """The position in each of a layer's first `past` slots when the next position is `start` [1]; negative in an
        empty slot. Int64 [min(past, slots)], computed on the device."""
        slots = self.keys[layer].shape[2]
        last = start - 1
        return last - (last - torch.arange(min(past, slots), device=start.device)) % slots

    def extend_at(
        self,
        layer: int,
        row: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        empty: torch.Tensor,
        tokens: torch.Tensor,
        slot: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`extend` with row and positions on the device: operations and shapes do not depend on their values.

        Args:
            layer: index of the layer.
            row: [1] int64, index of the sequence.
            k, v: [1, kv_heads, seq, head_dim], the chunk's keys (after rotary embedding) and values.
            empty: [past] bool: which of the layer's first slots are empty for this sequence.
            tokens: [seq] int64, the tokens to store, some repeated.
            slot: [seq] int64, the slot of each; equal tokens have equal slots.

        Returns:
            Keys and values [1, kv_heads, past + seq, head_dim]: the first slots, zeros in the empty ones, then the
            chunk.
        """
        return (
            self._extend_at(self.keys[layer], row, k, empty, tokens, slot),
            self._extend_at(self.values[layer], row, v, empty, tokens, slot),
        )

    @staticmethod
    def _extend_at(
        cache: torch.Tensor,
        row: torch.Tensor,
        new: torch.Tensor,
        empty: torch.Tensor,
        tokens: torch.Tensor,
        slot: torch.Tensor,
    ) -> torch.Tensor:
        visible = new
        if len(empty):
            # Masked keys still enter the sums, times zero, so an empty slot must not hold NaN.
            old = cache[:, :, : len(empty)].index_select(0, row).masked_fill_(empty[:, None], 0)
            visible = torch.cat((old, new), dim=2)  # before the chunk overwrites keys that it attends to
        cache[row, :, slot] = new[0].transpose(0, 1).index_select(0, tokens)
        return visible

    def _extend(self, cache: torch.Tensor, layer: int, start: int, new: torch.Tensor) -> torch.Tensor:
        slots, end = cache.shape[2], start + new.shape[2]
        if end <= slots:
            cache[:, :, start:end] = new
            return cache[:, :, :end]
        window = self.windows[layer]
        assert window is not None, "a full layer has a slot for every position"
        visible = torch.cat((history(cache, start, min(start, window)), new), dim=2)
        if start >= window:
            visible[:, :, 0] = 0  # outside every window, and maybe overwritten by a step: see Prefill
        count = min(new.shape[2], slots)
        slot = torch.arange(end - count, end, device=new.device) % slots
        cache[:, :, slot] = new[:, :, -count:]
        return visible

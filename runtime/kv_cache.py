"""The static key and value buffers, and the window rule.

A layer that attends to everything has a slot for each of max_seq_len positions. A sliding layer has no more slots than
its window: position p lives in slot p % slots, over the key that has just left the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.config import ModelConfig
from runtime.kernels.attention_reference import history


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each [batch, kv_heads, slots, head_dim]; slots differ between layers."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    windows: tuple[int | None, ...]

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Makes empty buffers for `batch` sequences of up to `max_seq_len` tokens."""

        def buffers() -> tuple[torch.Tensor, ...]:
            slots = (min(window or max_seq_len, max_seq_len) for window in config.windows)
            return tuple(
                torch.zeros(batch, config.kv_heads, count, config.head_dim, dtype=dtype, device=device)
                for count in slots
            )

        return cls(buffers(), buffers(), config.windows)

    def first_rows(self, rows: int) -> KVCache:
        """The buffers of the first `rows` sequences: views."""
        keys, values = (tuple(buffer[:rows] for buffer in buffers) for buffers in (self.keys, self.values))
        return KVCache(keys, values, self.windows)

    def extend(
        self, layer: int, row: int, start: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a chunk of one sequence and returns all that the chunk's queries may look at.

        Args:
            layer, row: which buffer, which sequence.
            start: position of the chunk's first token; earlier positions are cached already.
            k, v: [1, kv_heads, seq, head_dim], the chunk's keys (after rotary embedding) and values.

        Returns:
            Keys and values [1, kv_heads, keys, head_dim], oldest first, ending with the chunk: all positions so far,
            or in a sliding layer the chunk and the window - 1 positions before it.
        """
        return (
            self._extend(self.keys[layer][row : row + 1], layer, start, k),
            self._extend(self.values[layer][row : row + 1], layer, start, v),
        )

    def _extend(self, cache: torch.Tensor, layer: int, start: int, new: torch.Tensor) -> torch.Tensor:
        slots, end = cache.shape[2], start + new.shape[2]
        if end <= slots:
            cache[:, :, start:end] = new
            return cache[:, :, :end]
        window = self.windows[layer]
        assert window is not None, "a full layer has a slot for every position"
        seen = torch.cat((history(cache, start, min(start, window - 1)), new), dim=2)
        kept = min(new.shape[2], slots)
        slot = torch.arange(end - kept, end, device=new.device) % slots
        cache[:, :, slot] = new[:, :, -kept:]
        return seen

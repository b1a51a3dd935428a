"""What earlier prompts left: whole chunks of their keys and values, copied into the rows of prompts that begin alike.

A chunk's bits depend on its tokens and those before it and on nothing else, so a copy is what running it again would
compute. Copies lie outside the rows, since a row is handed on and a sliding layer's ring forgets. What decode steps
wrote is never kept: it was summed in another order.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from runtime.families.state import DecodeState
from runtime.model.huge_pages import Slab
from runtime.model.memory_plan import kept_chunks
from runtime.model.model import Model

BEGINNING = 0  # the number of what comes before the first chunk


class Key(NamedTuple):
    """A chunk by all tokens up to its end: its own, and which chunk comes before it."""

    before: int  # that chunk's number, which no other ever gets
    ids: tuple[int, ...]


class KeptChunk(NamedTuple):
    """One chunk in the pool."""

    number: int
    place: int  # in the pool


class PrefixCache:
    """Whole chunks of earlier prompts, found again by their token ids from position 0 on.

    The pool is allocated once. The least recently used chunk makes room for a new one; a use of a chunk is also one of
    those before it, so that none goes before those that follow it. Not for several threads at once.
    """

    def __init__(self, model: Model) -> None:
        """Allocates room for as many chunks as the memory plan counts.

        Args:
            model: the model whose prompts are kept; its prefill_chunk is a chunk's length.
        """
        config, self._size = model.config, model.runtime.prefill_chunk
        self._capacity = kept_chunks(config, model.runtime)
        shapes = [(self._capacity, layer.kv_heads, self._size, layer.head_dim) for layer in config.layers]
        slab = Slab(shapes * 2, model.dtype, model.device)
        self._keys, self._values = ([slab.take(shape) for shape in shapes] for _ in range(2))
        self._chunks: OrderedDict[Key, KeptChunk] = OrderedDict()  # the least recently used one first
        self._numbers = itertools.count(BEGINNING + 1)

    def __repr__(self) -> str:
        return f"PrefixCache({len(self._chunks)} of {self._capacity} chunks of {self._size} tokens)"

    def match(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt can be copied: whole chunks, and never its last token, since the token after it
        is picked from that one's residual."""
        return len(self._chain(ids, len(ids) - 1)) * self._size

    @torch.inference_mode()
    def restore(self, state: DecodeState, row: int, ids: Sequence[int]) -> int:
        """Copies what matches a prompt into a row's cache, as if its chunks had been run.

        Args:
            state: its cache is written at that row; a layer with a sliding window gets what its ring holds.
            row: which.
            ids: the prompt.

        Returns:
            How many tokens the row's cache now holds, as `match` says.
        """
        chain = self._chain(ids, len(ids) - 1)
        self._use(chain)
        end = len(chain) * self._size
        for start, key in zip(range(0, end, self._size), chain, strict=True):
            for kept, cached in self._copies(state, row, start, self._chunks[key].place, end):
                cached.copy_(kept)
        return end

    @torch.inference_mode()
    def keep(self, state: DecodeState, row: int, ids: Sequence[int], start: int) -> None:
        """Keeps a chunk that has just been run, unless it is kept already, what comes before it is not, or there is no
        room beside that.

        Args:
            state: the chunk is the last in this row's cache.
            row: which.
            ids: the prompt.
            start: position of the chunk's first token, a multiple of the chunk's length; the chunk is a whole one.
        """
        end = start + self._size
        assert start % self._size == 0 and end <= len(ids), "only whole chunks are kept"
        chain = self._chain(ids, end)
        self._use(chain)
        if len(chain) * self._size != start or len(chain) >= self._capacity:
            return
        if len(self._chunks) >= self._capacity:
            self._chunks.popitem(last=False)
        taken = {chunk.place for chunk in self._chunks.values()}
        place = next(place for place in range(self._capacity) if place not in taken)
        for kept, cached in self._copies(state, row, start, place, end):
            kept.copy_(cached)
        before = self._chunks[chain[-1]].number if chain else BEGINNING
        key = Key(before, tuple(ids[start:end]))
        self._chunks[key] = KeptChunk(next(self._numbers), place)
        self._use(chain)

    def _chain(self, ids: Sequence[int], end: int) -> list[Key]:
        """The chunks that are kept of the first `end` ids, from the first one on."""
        chain: list[Key] = []
        before = BEGINNING
        for start in range(0, end - self._size + 1, self._size):
            key = Key(before, tuple(ids[start : start + self._size]))
            if key not in self._chunks:
                break
            chain.append(key)
            before = self._chunks[key].number
        return chain

    def _use(self, chain: list[Key]) -> None:
        """Makes a chain's chunks the most recently used, its first one last: what follows a chunk goes before it."""
        for key in reversed(chain):
            self._chunks.move_to_end(key)

    def _copies(
        self, state: DecodeState, row: int, start: int, place: int, end: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A chunk's keys and values in the pool and in a row that is filled up to `end`, as pairs of views; without
        those that a ring has lost by then."""
        cache = state.cache
        pools = zip((*self._keys, *self._values), (*cache.keys, *cache.values), strict=True)
        for index, (pool, buffer) in enumerate(pools):
            oldest = max(start, end - buffer.shape[2])
            for positions, slots in cache.spans(index % len(cache.keys), oldest, start + self._size):
                yield pool[place, :, positions.start - start : positions.stop - start], buffer[row, :, slots]

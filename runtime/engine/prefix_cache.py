"""The prefix cache: chunks of earlier prompts' keys and values, copied into the rows of prompts that begin alike.

A chunk's bits depend only on its tokens and those before it, so a copy equals what running the chunk again would
compute. Copies are kept outside the rows, since rows are reused and a sliding layer's ring overwrites old positions.
What decode steps wrote is never kept: it was summed in another order.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from runtime.families.state import DecodeState
from runtime.model.huge_pages import Slab
from runtime.model.memory_plan import kept_tokens
from runtime.model.model import Model

BEGINNING = 0  # the number of what comes before the first chunk


class Key(NamedTuple):
    """Identifies a chunk by all tokens up to its end: its own, and the chunk before it."""

    before: int  # the number of the chunk before; no number is ever reused
    ids: tuple[int, ...]


class KeptChunk(NamedTuple):
    """One chunk in the pool."""

    number: int
    places: tuple[int, ...]  # in the pool, each but the last one full


class PrefixCache:
    """Chunks of earlier prompts, found by their token ids from position 0 on. A prompt's last chunk is kept only if it
    has the full length of its kind.

    The pool is allocated once. The least recently used chunk is evicted for a new one; using a chunk also uses those
    before it, so that none is evicted before those that follow it. Not thread-safe.
    """

    def __init__(self, model: Model) -> None:
        """Allocates room for as many tokens as the memory plan counts.

        Args:
            model: the model whose prompts are kept; its RuntimeConfig says where chunks begin and end.
        """
        config, self._runtime = model.config, model.runtime
        self._place = model.runtime.tail_chunk  # tokens of one place
        self._capacity = kept_tokens(config, model.runtime) // self._place
        shapes = [(self._capacity, layer.kv_heads, self._place, layer.head_dim) for layer in config.layers]
        slab = Slab(shapes * 2, model.dtype, model.device)
        self._keys, self._values = ([slab.take(shape) for shape in shapes] for _ in range(2))
        self._chunks: OrderedDict[Key, KeptChunk] = OrderedDict()  # the least recently used one first
        self._numbers = itertools.count(BEGINNING + 1)

    def __repr__(self) -> str:
        used = self._capacity - len(self._free())
        return f"PrefixCache({len(self._chunks)} chunks in {used} of {self._capacity} places of {self._place} tokens)"

    def match(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt can be copied: never its last one, since the first new token is picked from that
        one's residual."""
        return sum(len(key.ids) for key in self._chain(ids, len(ids) - 1))

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
        end, start = sum(len(key.ids) for key in chain), 0
        for key in chain:
            chunk = range(start, start + len(key.ids))
            for kept, cached in self._copies(state, row, chunk, self._chunks[key].places, end):
                cached.copy_(kept)
            start = chunk.stop
        return end

    @torch.inference_mode()
    def keep(self, state: DecodeState, row: int, ids: Sequence[int], chunk: range) -> None:
        """Keeps a chunk that has just been run, unless it is kept already, the chunks before it are not, there is no
        room beside those, or it is shorter than others of its kind, so that no other prompt would have it.

        Args:
            state: the chunk is the last in this row's cache.
            row: which.
            ids: the prompt.
            chunk: its positions, one of the prompt's prefill_chunks.
        """
        chain = self._chain(ids, chunk.stop)
        self._use(chain)
        needed = -(-len(chunk) // self._place)
        room = self._capacity - sum(len(self._chunks[key].places) for key in chain)
        is_whole = len(chunk) in (self._runtime.prefill_chunk, self._runtime.tail_chunk)
        if not is_whole or sum(len(key.ids) for key in chain) != chunk.start or room < needed:
            return
        while len(free := self._free()) < needed:
            self._chunks.popitem(last=False)
        places = tuple(free[:needed])
        for kept, cached in self._copies(state, row, chunk, places, chunk.stop):
            kept.copy_(cached)
        before = self._chunks[chain[-1]].number if chain else BEGINNING
        key = Key(before, tuple(ids[chunk.start : chunk.stop]))
        self._chunks[key] = KeptChunk(next(self._numbers), places)
        self._use(chain)

    def _free(self) -> list[int]:
        """The places that no chunk has: computed from the chunks each time, so that an interrupt cannot lose any."""
        taken = {place for chunk in self._chunks.values() for place in chunk.places}
        return [place for place in range(self._capacity) if place not in taken]

    def _chain(self, ids: Sequence[int], end: int) -> list[Key]:
        """The kept chunks of the first `end` ids, from the first one up to a chunk that is not kept."""
        chain: list[Key] = []
        before = BEGINNING
        for chunk in self._runtime.prefill_chunks(len(ids)):
            key = Key(before, tuple(ids[chunk.start : chunk.stop]))
            if chunk.stop > end or key not in self._chunks:
                break
            chain.append(key)
            before = self._chunks[key].number
        return chain

    def _use(self, chain: list[Key]) -> None:
        """Makes a chain's chunks the most recently used, its first one last, so that what follows a chunk is evicted
        before it."""
        for key in reversed(chain):
            self._chunks.move_to_end(key)

    def _copies(
        self, state: DecodeState, row: int, chunk: range, places: tuple[int, ...], end: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A chunk's keys and values in the pool and in a row that is filled up to `end`, as pairs of views; without
        positions that a ring has overwritten by then."""
        cache = state.cache
        pools = list(zip((*self._keys, *self._values), (*cache.keys, *cache.values), strict=True))
        for start, place in zip(chunk[:: self._place], places, strict=True):
            stop = min(start + self._place, chunk.stop)
            for index, (pool, buffer) in enumerate(pools):
                oldest = max(start, end - buffer.shape[2])
                for positions, slots in cache.spans(index % len(cache.keys), oldest, stop):
                    yield pool[place, :, positions.start - start : positions.stop - start], buffer[row, :, slots]

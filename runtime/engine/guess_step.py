"""Checks guesses in one step of Triton's kernels, on a GPU as one CUDA graph: its rows are an answer's last token and
guesses at those after it.

Everything that follows from the model's picks is decided on the device: how many guesses are right, which keys and
values go to the cache, and what the next step begins with. So the host waits once, for the tokens. Where an answer
chooses its tokens from all logits, the host replaces the head's picks halfway through the step. Until a guess is known
to be right, its keys and values stay outside the cache, so a wrong guess does no harm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from runtime.engine.answer import Answer
from runtime.engine.decode import take_back
from runtime.engine.first_token import make_ready
from runtime.engine.graph import CapturedGraph, GraphKey, captured, run_plainly
from runtime.engine.guesses import Checked, checked
from runtime.families import FAMILIES
from runtime.families.head import pick_token
from runtime.families.state import DecodeState
from runtime.kernels.advance import embed_torch
from runtime.kernels.ops import Ops
from runtime.kernels.store_keys import Buffer
from runtime.model.model import Model


class GuessStep:
    """Takes steps of up to `most` rows for the sequence in a state's first row. Row counts are padded to a power of two
    or to `most`, to keep graphs few.

    Args:
        model: the model.
        state: of at least `most` rows, whose scratch buffers are used; no other row may decode meanwhile.
        most: rows of a step, no more than a ring has slots.
    """

    def __init__(self, model: Model, state: DecodeState, most: int) -> None:
        self._state, self._most = state, most
        self._row = state.token.new_zeros(1)
        self._given = state.token.new_zeros(most)  # the number of rows that are not padding, then guesses
        self._found = state.token.new_zeros(1 + most)  # the number of tokens, then what each row has picked
        self._place = torch.arange(most, device=state.token.device)
        self._graphs: dict[GraphKey, CapturedGraph | None] = {}
        self._rows = {rows: self._of_rows(rows) for rows in self.row_counts}

        layers, memory = model.config.layers, state.cache.memory
        self._width = max(layer.kv_heads * layer.head_dim for layer in layers)
        self._new = memory.new_zeros(2 * most * sum(layer.kv_heads * layer.head_dim for layer in layers))
        self._new_of: list[torch.Tensor] = []  # [2, most, kv_heads, head_dim]: a layer's new keys and values
        buffers, start = [], 0
        for layer, *caches in zip(layers, state.cache.keys, state.cache.values, strict=True):
            size = most * layer.kv_heads * layer.head_dim
            new = self._new[start : start + 2 * size].view(2, most, layer.kv_heads, layer.head_dim)
            self._new_of.append(new)
            for cache in caches:
                offset = (cache.data_ptr() - memory.data_ptr()) // memory.itemsize
                buffers.append(Buffer(offset, start, *cache.shape[1:]))
                start += size
        self._buffers = torch.tensor(buffers, dtype=torch.int64, device=memory.device)

    @property
    def row_counts(self) -> list[int]:
        """The row counts that steps are padded to."""
        return [min(1 << power, self._most) for power in range(1, (self._most - 1).bit_length() + 1)]

    def _of_rows(self, rows: int) -> DecodeState:
        """The buffers of a step of `rows` rows: the state's own, except token and position, whose values the state
        keeps between steps."""
        view = self._state.first_rows(rows)
        fresh: dict[str, Any] = {name: torch.zeros_like(getattr(view, name)) for name in ("token", "position")}
        return dataclasses.replace(view, **fresh, graphs={}, rings={}, parent=self._state)

    def capture(self, model: Model, samples: bool = False) -> None:
        """Captures the steps where they can be captured, so that no step has to wait for it."""
        self._given[0] = 1
        for rows in self.row_counts:
            self._replay(model, rows, samples)

    def check(self, model: Model, answer: Answer, guesses: list[int]) -> Checked:
        """Runs the answer's last token, in the state's first row, and guesses at those after it, and leaves the row as
        plain steps would.

        Returns:
            As `checked`.
        """
        samples = answer.sampling.samples
        if answer.choice is None:
            return Checked(self.run(model, guesses, samples))
        rows, step = self._give(guesses)
        self._part(model, "guesses, chosen", self._pick, rows, samples)()
        found = checked(answer, step.token.tolist(), step.logits, guesses)
        step.token[: len(found.tokens)].copy_(torch.tensor(found.tokens, device="cpu"))
        self._part(model, "settling", self._settle, rows, samples)()
        return found

    def run(self, model: Model, guesses: list[int], samples: bool = False) -> list[int]:
        """Runs the last token of the state's first row and guesses at those after it, and leaves the row as plain steps
        would.

        Returns:
            The answer's next tokens: the right guesses up to the first wrong one or a stop token, then the model's own
            token; NO_TOKEN where its logits are not finite.
        """
        rows, _ = self._give(guesses)
        self._replay(model, rows, samples)()
        tokens, *picked = self._found[: 1 + rows].tolist()
        return picked[:tokens]

    def _give(self, guesses: list[int]) -> tuple[int, DecodeState]:
        """Hands guesses to the device; returns the number of rows that the step has, and their buffers."""
        count = 1 + len(guesses)
        self._given[:count].copy_(torch.tensor([count, *guesses], device="cpu"))
        rows = next(rows for rows in self.row_counts if rows >= count)
        return rows, self._rows[rows]

    def _replay(self, model: Model, rows: int, samples: bool) -> Callable[[], None]:
        return self._part(model, "guesses", self.take, rows, samples)

    def _part(self, model: Model, kind: str, part: Callable[..., None], rows: int, samples: bool) -> Callable[[], None]:
        """A function that runs a part of a step: a graph captured on first use, or plain calls."""

        def operations(ops: Ops) -> None:
            part(ops, model, rows, samples)

        def warm_up(ops: Ops) -> None:
            take_back(self._state, lambda: self.take(ops, model, rows, samples))

        graph = captured(model, self._graphs, (kind, rows, int(samples)), operations, warm_up)
        return partial(run_plainly, model, operations) if graph is None else graph.replay

    @torch.inference_mode()
    def take(self, ops: Ops, model: Model, rows: int, samples: bool = False) -> None:
        """Runs a step of `rows` rows, padding included, on a backend: the same operations and addresses every time."""
        self._pick(ops, model, rows, samples)
        self._settle(ops, model, rows)

    @torch.inference_mode()
    def _pick(self, ops: Ops, model: Model, rows: int, samples: bool) -> None:
        """The first part of a step, up to what each row picks."""
        state, step, place, given = self._state, self._rows[rows], self._place[:rows], self._given[:rows]
        first = state.position.index_select(0, self._row)
        # Padding has the position of the last row, and nobody reads its results.
        step.position.copy_(first + torch.minimum(place, given[:1] - 1))
        ids = torch.cat((state.token.index_select(0, self._row), given[1:]))
        step.x.copy_(embed_torch(model.weights.embedding, ids, state.embed_scale))
        new_of_layer = iter(self._new_of)

        def attention(*arguments: Any, **options: Any) -> None:
            new_keys, new_values = next(new_of_layer)[:, :rows]
            ops.sequence_attention(*arguments, **options, row=self._row, new_keys=new_keys, new_values=new_values)

        residual = FAMILIES[model.config.family].decode_layers(ops, model, step, attention)
        sampling = state.sampling_of(self._row, step.position) if samples else None
        pick_token(ops, model, step, step.token, **residual, logits=step.logits, sampling=sampling)

    @torch.inference_mode()
    def _settle(self, ops: Ops, model: Model, rows: int, samples: bool = False) -> None:
        """The second part: decides which tokens are the answer's, and leaves its row as plain steps would."""
        state, step, place, given = self._state, self._rows[rows], self._place[:rows], self._given[:rows]
        first = state.position.index_select(0, self._row)
        picked, guesses = step.token[:-1], given[1:]
        ends = (picked[:, None] == state.stop_ids.index_select(0, self._row)).any(dim=1)
        is_right = (picked == guesses) & ~ends & (place[1:] < given[:1])
        tokens = place[1:].masked_fill(is_right, rows).amin(dim=0, keepdim=True)  # up to the first that is not right
        self._found[:1].copy_(tokens)
        self._found[1 : 1 + rows].copy_(step.token)
        ops.store_keys(state.cache.memory, self._new, self._buffers, step.position, self._row, tokens, self._width)
        last = tokens - 1
        logits = None if step.logits is None else step.logits.index_select(0, last)
        make_ready(model, state, self._row, first + tokens, step.token.index_select(0, last), logits)
        state.step.add_(1)

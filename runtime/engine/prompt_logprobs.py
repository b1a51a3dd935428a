"""The log probabilities of a prompt's tokens: once its chunks have run, the head runs at every position but the last, a
few at a time, so that no other answer waits for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from runtime.engine.first_token import CapturedHead, make_ready
from runtime.engine.graph import ops_of, runs_compiled, runs_triton
from runtime.engine.prefill import Prefill, prefill_budget
from runtime.engine.short_chunk import MOST_PICKED
from runtime.families.head import Residual, pick_token
from runtime.families.state import DecodeState
from runtime.model.model import Model
from runtime.sampling.logprobs import TokenLogprob, logprobs_of

HEAD_WORK = 32  # cost of the head at a few positions, in tokens of a long chunk: it reads most of a small model


class ScoredPrefill(Prefill):
    """A prompt whose tokens' log probabilities are wanted too. It is done once they are known; until then the row waits
    as between two chunks.

    Args:
        model, state, row, ids, samples: as `Prefill`; the state has logits.
        top: how many of the likeliest tokens to report at each position.
    """

    def __init__(
        self, model: Model, state: DecodeState, row: int, ids: Sequence[int], top: int, *, samples: bool = False
    ) -> None:
        self.logprobs: list[TokenLogprob | None] = [None]  # of the prompt's tokens; none for the first
        self._picked: tuple[torch.Tensor, torch.Tensor] | None = None  # the first token and its logits, set aside
        hidden = torch.empty(len(ids), model.config.hidden, dtype=model.dtype, device=model.device)
        super().__init__(model, state, row, ids, hidden_out=hidden, samples=samples)
        self._top = top
        self._logits = logits_at(model, self._state, hidden[:-1])

    @property
    def is_done(self) -> bool:
        """Whether the first token and all log probabilities are known."""
        return not self._left and self._picked is None and len(self.logprobs) == len(self._ids)

    @property
    def next_work(self) -> float:
        return super().next_work if self._left else HEAD_WORK

    @torch.inference_mode()
    def advance(self, work: float = float("inf")) -> float:
        if not self._left:
            return self._score(min(work, prefill_budget(self._model)))
        done = super().advance(work)
        if not self._left:
            assert self._state.logits is not None
            at = slice(self.row, self.row + 1)
            self._picked = self._state.token[at].clone(), self._state.logits[at].clone()
            self._wait()
        return done

    def _score(self, work: float) -> float:
        """Scores the next positions; after the last one, restores the row as its prompt left it."""
        done: float = 0
        while len(self.logprobs) < len(self._ids) and (not done or done + HEAD_WORK <= work):
            logits, start = next(self._logits), len(self.logprobs)
            self.logprobs += logprobs_of(logits, self._ids[start : start + len(logits)], self._top)
            done += HEAD_WORK
        if len(self.logprobs) == len(self._ids):
            assert self._picked is not None
            row, end = (torch.tensor([value], device=self._model.device) for value in (self.row, len(self._ids)))
            make_ready(self._model, self._state, row, end, *self._picked)
            self._picked = None
        return done


def logits_at(model: Model, state: DecodeState, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits [n, vocab] of a few positions at a time, each overwritten by the next.

    Args:
        model: the model.
        state: whose workspace is used.
        hidden: [positions, hidden]: the residual after the last layer.
    """
    if not len(hidden):
        return
    if runs_compiled(model):
        key = ("head", MOST_PICKED, 1)
        if key not in state.graphs:
            residual = Residual(x=hidden.new_zeros(MOST_PICKED, hidden.shape[1]), branch=None, branch_norm=None)
            state.graphs[key] = CapturedHead(model, state, residual, has_logits=True)
        head: CapturedHead = state.graphs[key]
        for rows in hidden.split(MOST_PICKED):
            head.x[-len(rows) :] = rows
            logits = head.run(len(rows))[1]
            assert logits is not None
            yield logits
        return
    for rows in hidden.split(min(MOST_PICKED, state.batch) if runs_triton(model) else MOST_PICKED):
        logits = hidden.new_empty(len(rows), model.config.vocab)
        pick_token(ops_of(model), model, state, state.token.new_empty(len(rows)), rows, logits=logits)
        yield logits

"""A prompt's first token: picked after its last chunk, and left in the state so that decode steps can follow."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from runtime.engine.graph import CapturedGraph
from runtime.families.head import Residual, pick_token
from runtime.families.state import DecodeState, Sampling
from runtime.kernels.advance import embed_torch
from runtime.kernels.ops import Ops
from runtime.model.model import Model


def pick_first_token(
    ops: Ops,
    model: Model,
    state: DecodeState,
    row: torch.Tensor,
    end: torch.Tensor,
    x: torch.Tensor,
    samples: bool = False,
) -> None:
    """Picks the token after position end - 1, and makes its row ready for decode steps.

    Args:
        ops: the backend of the head.
        model: the model.
        state: of all rows; one is written: token, position, done, x, and logits if it has them.
        row: [1] int64 on the device: which.
        end: [1] int64 on the device: the prompt's length.
        x: [1, hidden]: the residual of the prompt's last token after the last layer.
        samples: whether the token is drawn if the row has a temperature; not needed for a greedy row.
    """
    token = torch.empty_like(row)
    logits = None if state.logits is None else torch.empty_like(state.logits[:1])
    sampling = state.sampling_of(row, (end - 1).to(torch.int32)) if samples else None
    pick_token(ops, model, state, token, x, logits=logits, sampling=sampling)
    make_ready(model, state, row, end, token, logits)


def make_ready(
    model: Model,
    state: DecodeState,
    row: torch.Tensor,
    end: torch.Tensor,
    token: torch.Tensor,
    logits: torch.Tensor | None,
) -> None:
    """The second half of `pick_first_token`, given the token [1] int64 that has been picked, and its logits [1, vocab]
    if the state has logits."""
    state.token.index_copy_(0, row, token)
    state.position.index_copy_(0, row, end.to(torch.int32))
    done = (token[:, None] == state.stop_ids.index_select(0, row)).any(dim=1).logical_or_(token < 0)
    state.done.index_copy_(0, row, done.logical_or_(end >= state.limit.index_select(0, row)))
    embedding = embed_torch(model.weights.embedding, token.clamp(min=0), state.embed_scale, model.dtype)
    state.x.index_copy_(0, row, embedding)
    if state.logits is not None and logits is not None:
        state.logits.index_copy_(0, row, logits)


def pick_captured(
    model: Model, state: DecodeState, x: torch.Tensor, drawn: Drawn | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The token [1] after the residual x [1, hidden] and its logits, as `CapturedHead.run`, by a head captured on first
    use."""
    key = ("head", 0, int(state.logits is not None))
    if key not in state.graphs:
        residual = Residual(x=state.x.new_zeros(1, state.x.shape[1]), branch=None, branch_norm=None)
        state.graphs[key] = CapturedHead(model, state, residual, has_logits=state.logits is not None)
    head: CapturedHead = state.graphs[key]
    head.x.copy_(x)
    return head.run(drawn=drawn)


class Drawn(NamedTuple):
    """What tokens are drawn by: the row that they belong to, and the position of the token that the last one
    follows."""

    row: int
    position: int


class CapturedHead:
    """The head of decode steps on a CPU, for one position or a few: PyTorch's product with a single row takes three
    times as long.

    Args:
        model: the model.
        state: its workspace is used.
        residual: of at most 8 rows: the tensors that every run reads.
        has_logits: whether it gives logits as well as tokens.
    """

    def __init__(self, model: Model, state: DecodeState, residual: Residual, *, has_logits: bool) -> None:
        self.x = residual["x"]
        rows = len(self.x)
        self._token = state.token.new_zeros(rows)
        self._logits = self.x.new_zeros(rows, model.config.vocab) if has_logits else None
        self._state = state
        self._sampling = Sampling(
            state.seed.new_zeros(rows), state.position.new_zeros(rows), state.inverse_temperature.new_zeros(rows)
        )
        self._greedy, self._sampled = CapturedGraph(model), CapturedGraph(model)
        for graph, sampling in ((self._greedy, None), (self._sampled, self._sampling)):
            graph.capture(partial(self._pick, model=model, state=state, residual=residual, sampling=sampling))

    def _pick(self, ops: Ops, model: Model, state: DecodeState, residual: Residual, sampling: Sampling | None) -> None:
        pick_token(ops, model, state, self._token, **residual, logits=self._logits, sampling=sampling)

    def run(self, rows: int = 1, drawn: Drawn | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next tokens [rows] of the last `rows` rows, and their logits [rows, vocab] if it gives them: both
        overwritten by the next run. They are drawn by `drawn` if it is given, else picked greedily."""
        if drawn is None:
            self._greedy.replay(rows=rows)
        else:
            seed, position, inverse_temperature = self._sampling
            seed[-rows:] = self._state.seed[drawn.row]
            position[-rows:] = torch.arange(drawn.position - rows + 1, drawn.position + 1, device="cpu")
            inverse_temperature[-rows:] = self._state.inverse_temperature[drawn.row]
            self._sampled.replay(rows=rows)
        return self._token[-rows:], None if self._logits is None else self._logits[-rows:]

"""How likely each token of a prompt was: the head once more, at every position but the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from runtime.engine.first_token import CapturedHead
from runtime.engine.graph import ops_of, runs_compiled, runs_triton
from runtime.engine.short_chunk import MOST_PICKED
from runtime.families.head import Residual, pick_token
from runtime.families.state import DecodeState
from runtime.model.model import Model
from runtime.sampling.logprobs import TokenLogprob, logprobs_of


@torch.inference_mode()
def prompt_logprobs(
    model: Model, state: DecodeState, prompt: Sequence[int], hidden: torch.Tensor, top: int
) -> tuple[TokenLogprob | None, ...]:
    """How likely each token was after those before it; None for the first.

    Args:
        model: the model.
        state: one with logits, whose workspaces are used.
        prompt: its ids.
        hidden: [len(prompt), hidden] in the model's dtype: the residual after the last layer.
        top: how many of the likeliest to report at each position.
    """
    found: list[TokenLogprob | None] = [None]
    for logits in _logits(model, state, hidden[:-1]) if len(prompt) > 1 else ():
        found += logprobs_of(logits, prompt[len(found) : len(found) + len(logits)], top)
    return tuple(found)


def _logits(model: Model, state: DecodeState, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits [n, vocab] of a few positions at a time, each overwritten by the next."""
    if runs_compiled(model):
        key = ("head", MOST_PICKED, 1)
        if key not in state.graphs:
            residual = Residual(x=hidden.new_zeros(MOST_PICKED, hidden.shape[1]), branch=None, branch_norm=None)
            state.graphs[key] = CapturedHead(model, state, residual)
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

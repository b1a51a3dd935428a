"""Log probabilities of tokens: the log softmax, in fp32, of the logits as rounded to the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.sampling.filters import at_least, nth_greatest


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was by the model's own logits, at temperature 1, before anything else was done to them.

    `top` are the likeliest tokens in its place with their log probabilities, the likeliest first, as many as were asked
    for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs_of(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """How likely each of some tokens was.

    Args:
        logits: [rows, vocab] in the model's dtype.
        tokens: one for each row.
        top: how many of the likeliest to report, 0 to vocab.
    """
    found = []
    for row, token in zip(logits.float(), tokens, strict=True):
        total = row.logsumexp(dim=0)
        ids = _likeliest(row, top) if top else row.new_empty(0, dtype=torch.int64)
        logprob, *others = (row[torch.cat((ids.new_tensor([token]), ids))] - total).tolist()
        found.append(TokenLogprob(token, logprob, tuple(zip(ids.tolist(), others, strict=True))))
    return found


def _likeliest(row: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the greatest logits, the greatest first and the lower id first among equals."""
    ids = at_least(row, nth_greatest(row, count))
    return ids[row[ids].sort(descending=True, stable=True).indices[:count]]

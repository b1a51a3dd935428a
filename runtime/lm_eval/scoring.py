"""Log-likelihoods: one prefill of the input, then the LM head on the positions that predict the continuations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.engine.non_finite import non_finite
from runtime.engine.prefill import prefill
from runtime.engine.scheduler import scheduler_of
from runtime.kernels.argmax import logits_torch
from runtime.kernels.rms_norm import rms_norm_torch
from runtime.model.model import Model

ROWS_AT_ONCE = 64  # positions whose logits exist together: a quarter of a million fp32 numbers each


def score(
    model: Model, ids: Sequence[int], continuations: list[list[int]], softmax_dtype: torch.dtype | None = None
) -> list[tuple[float, bool]]:
    """Score continuations that share their input.

    Args:
        model: the model.
        ids: the input, which ends with all tokens of each continuation but its last.
        continuations: ids, at least one each.
        softmax_dtype: what log-probabilities are computed and added up in; None means the model's dtype.

    Returns:
        For each continuation its log-likelihood, and whether greedy decoding would give it.

    Raises:
        NonFiniteError: logits are not finite.
    """
    longest = max(map(len, continuations))
    with scheduler_of(model).free_row() as (state, row):
        hidden = torch.empty(len(ids), model.config.hidden, dtype=model.dtype, device=model.device)
        prefill(model, state, row, ids, hidden_out=hidden)

    padded = [[0] * (longest - len(continuation)) + continuation for continuation in continuations]
    targets = torch.tensor(padded, device=model.device).T  # [longest, continuations]
    blocks = zip(hidden[-longest:].split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    scored, argmax = zip(*(_log_probs(model, x, block, softmax_dtype) for x, block in blocks), strict=True)
    log_probs, greedy = torch.cat(scored).T.contiguous(), torch.cat(argmax).tolist()
    return [
        (float(row[-len(continuation) :].sum()), greedy[-len(continuation) :] == continuation)
        for row, continuation in zip(log_probs, continuations, strict=True)
    ]


@torch.inference_mode()
def _log_probs(
    model: Model, x: torch.Tensor, targets: torch.Tensor, softmax_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the residual x [n, hidden]: the log-probabilities of the tokens `targets` [n, any], and the argmax [n]."""
    weights, config = model.weights, model.config
    normed = rms_norm_torch(x, weights.final_norm, config.rms_norm_eps)
    log_probs = logits_torch(normed, weights.head, config.final_softcap).log_softmax(-1, dtype=softmax_dtype)
    if not log_probs.amax(-1).isfinite().all():
        raise non_finite(model, "of a text to be scored")
    return log_probs.gather(1, targets), log_probs.argmax(-1)

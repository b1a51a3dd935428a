"""Log-likelihoods: one prefill of the input, then the LM head on the positions that predict the continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from runtime.engine.graph import runs_compiled
from runtime.engine.non_finite import non_finite
from runtime.engine.prefill import prefill
from runtime.engine.prompt_logprobs import logits_at
from runtime.engine.scheduler import scheduler_of
from runtime.families.state import DecodeState
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
        softmax_dtype: the dtype that log-probabilities are computed and summed in; None means the model's dtype.

    Returns:
        For each continuation its log-likelihood, and whether greedy decoding would give it.

    Raises:
        NonFiniteError: logits are not finite.
    """
    longest = max(map(len, continuations))
    padded = [[0] * (longest - len(continuation)) + continuation for continuation in continuations]
    targets = torch.tensor(padded, device=model.device).T  # [longest, continuations]
    with scheduler_of(model).free_row() as (state, row):
        hidden = torch.empty(len(ids), model.config.hidden, dtype=model.dtype, device=model.device)
        prefill(model, state, row, ids, hidden_out=hidden)
        log_probs, greedy = _scored(model, state, hidden[-longest:], targets, softmax_dtype)
    return [
        (float(row[-len(continuation) :].sum()), greedy[-len(continuation) :] == continuation)
        for row, continuation in zip(log_probs.T.contiguous(), continuations, strict=True)
    ]


@torch.inference_mode()
def _scored(
    model: Model, state: DecodeState, hidden: torch.Tensor, targets: torch.Tensor, softmax_dtype: torch.dtype | None
) -> tuple[torch.Tensor, list[int]]:
    """From the residual [positions, hidden]: the log-probabilities of the tokens `targets` [positions, any], and the
    argmax of each position."""
    scored: list[torch.Tensor] = []
    argmax: list[int] = []
    for logits in _logits(model, state, hidden):
        log_probs = logits.log_softmax(-1, dtype=softmax_dtype)
        if not log_probs.amax(-1).isfinite().all():
            raise non_finite(model, "of a text to be scored")
        scored.append(log_probs.gather(1, targets[len(argmax) : len(argmax) + len(logits)]))
        argmax += log_probs.argmax(-1).tolist()
    return torch.cat(scored), argmax


def _logits(model: Model, state: DecodeState, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits [n, vocab] of a few positions at a time, from the residual [positions, hidden] of the last layer."""
    if runs_compiled(model):  # PyTorch's product would dequantise a head in blocks
        yield from logits_at(model, state, hidden)
        return
    weights, config = model.weights, model.config
    for rows in hidden.split(ROWS_AT_ONCE):
        normed = rms_norm_torch(rows, weights.final_norm, config.rms_norm_eps)
        yield logits_torch(normed, weights.head, config.final_softcap)

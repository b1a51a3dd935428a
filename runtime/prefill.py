"""Prefill: from a prompt to its first token.

Plain PyTorch with Hugging Face's operations in its order, one sequence at a time and without padding, so that a row's
cache and first token do not depend on what shares the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from runtime import kernels
from runtime.kernels.advance import embed_reference
from runtime.kernels.argmax import logits_reference
from runtime.kernels.rms_norm import rms_norm_reference
from runtime.models import FAMILIES
from runtime.models.chunk import Chunk
from runtime.state import DecodeState

if TYPE_CHECKING:
    from runtime.load import Model


@torch.inference_mode()
def prefill(
    model: Model, state: DecodeState, row: int, ids: Sequence[int], *, hidden_out: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs a prompt from an empty cache, in chunks, and picks its first token.

    Args:
        model: the model.
        state: one row of it is written: cache, token, position, done, x, and logits where the state has them.
        row: which.
        ids: the prompt, 1 to max_seq_len ids.
        hidden_out: [len(ids), hidden] in the model's dtype, written if given: the residual stream after the last
            layer, which `logits` takes.

    Returns:
        The first token [1] int64: a view of state.token.

    Raises:
        ValueError: no such row, or the prompt is empty, too long or holds an id outside the vocabulary.
    """
    config, weights = model.config, model.weights
    _check_prompt(model, state, row, ids)
    prompt = torch.tensor(ids, dtype=torch.int64, device=weights.embedding.device)
    layers = FAMILIES[config.family].prefill_layers
    step = model.runtime.prefill_chunk
    for start in range(0, len(ids), step):
        chunk_ids = prompt[None, start : start + step]
        seq = chunk_ids.shape[1]
        x = embed_reference(weights.embedding, chunk_ids, state.embed_scale)
        x = layers(Chunk(model, state.cache, row, start, seq), x)
        if hidden_out is not None:
            hidden_out[start : start + seq] = x[0]

    token = state.token[row : row + 1]
    kernels.lm_head_argmax(
        token,
        x[0, -1:],
        weights.final_norm,
        weights.embedding,
        eps=config.rms_norm_eps,
        softcap=config.final_softcap,
        logits=None if state.logits is None else state.logits[row : row + 1],
        scratch=state.best,
    )
    state.position[row] = len(ids)
    state.done[row] = (token == state.stop_ids).any()
    state.x[row : row + 1] = embed_reference(weights.embedding, token, state.embed_scale)
    return token


@torch.inference_mode()
def logits(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """The logits after the residual stream `hidden` [n, hidden] of the last layer: [n, vocab] in the model's dtype.

    Row by row, with the bits that a decode step at that position compares.
    """
    config, weights = model.config, model.weights
    normed = rms_norm_reference(hidden, weights.final_norm, config.rms_norm_eps)
    rows = [logits_reference(row[None], weights.embedding, config.final_softcap) for row in normed]
    return torch.cat(rows) if rows else hidden.new_empty(0, config.vocab)


def _check_prompt(model: Model, state: DecodeState, row: int, ids: Sequence[int]) -> None:
    if not 0 <= row < state.batch:
        raise ValueError(f"row: expected 0 to {state.batch - 1}, got {row}")
    if not 1 <= len(ids) <= model.runtime.max_seq_len:
        raise ValueError(f"prompt: expected 1 to max_seq_len = {model.runtime.max_seq_len} tokens, got {len(ids)}")
    wrong = next((i for i in ids if not 0 <= i < model.config.vocab), None)
    if wrong is not None:
        raise ValueError(f"prompt: expected token ids from 0 to {model.config.vocab - 1}, got {wrong}")

"""What one head of one layer attends to: its attention weights over a prompt.

They are computed afresh, in plain PyTorch and without a cache, so that no state of a running answer is read or written.
They are those of Hugging Face's `output_attentions`, except that scores are not rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from runtime.engine.graph import run_plainly
from runtime.engine.non_finite import non_finite
from runtime.engine.scheduler import scheduler_of
from runtime.families import FAMILIES
from runtime.families.chunk import BaseChunk
from runtime.kernels.advance import embed_torch
from runtime.kernels.ops import Ops
from runtime.model.model import Model


@dataclass(repr=False)
class UncachedPrompt(BaseChunk):
    """A whole prompt in one chunk, whose keys and values are not needed afterwards."""

    model: Model
    seq: int

    def visible(self, index: int) -> torch.Tensor:
        """Which keys each query of layer `index` sees, [seq, seq] bool."""
        ones = torch.ones(self.seq, self.seq, dtype=torch.bool, device=self.model.device)
        window = self.model.config.layers[index].window
        return ones.tril() if window is None else ones.tril().triu(1 - window)

    def _angles(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.model.rope.for_layer(index)
        return cos[: self.seq], sin[: self.seq]

    def _extend(self, index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return k, v, self.visible(index)[None, None]


def attention_weights(model: Model, ids: Sequence[int], layer: int, head: int) -> torch.Tensor:
    """How much each token of a prompt attends to itself and to those before it.

    Answers that are under way advance by one step between any two layers.

    Args:
        model: the model.
        ids: the prompt, 1 to max_seq_len ids.
        layer, head: indices from 0; the head is a query head.

    Returns:
        [len(ids), len(ids)] fp32 on the CPU, a row for each query, which sums to 1.

    Raises:
        NonFiniteError: the weights are not finite.
        ModelClosed: the model has been closed.
        Exception: a step of the other answers has failed.
    """
    prompt, scheduler = UncachedPrompt(model, len(ids)), scheduler_of(model)
    residuals: Iterator[torch.Tensor] = iter(())
    x = weights = torch.empty(0, device="cpu")

    # Each enters inference mode by itself: what a step between them allocates may be modified outside that mode.
    @torch.inference_mode()
    def embed(ops: Ops) -> None:
        nonlocal x, residuals
        tokens = torch.tensor([ids], dtype=torch.int64, device=model.device)
        embed_scale = torch.tensor(model.config.hidden**0.5, dtype=model.dtype, device="cpu").item()
        x = embed_torch(model.weights.embedding, tokens, embed_scale, model.dtype)
        residuals = FAMILIES[model.config.family].prefill_layers(prompt, x)

    @torch.inference_mode()
    def next_layer(ops: Ops) -> None:
        nonlocal x
        x = next(residuals)

    @torch.inference_mode()
    def look(ops: Ops) -> None:
        nonlocal weights
        weights = _weights(prompt, x, layer, head)

    with scheduler.alone():
        run_plainly(model, embed)
        for _ in range(layer):
            run_plainly(model, next_layer)
            if scheduler.running or scheduler.waiting:
                scheduler.step()
        run_plainly(model, look)
    if not weights.isfinite().all():
        raise non_finite(model, f"of attention in layer {layer}")
    return weights


def _weights(prompt: UncachedPrompt, x: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    """A head's attention weights, from the residual x [1, seq, hidden] before a layer."""
    config, sizes = prompt.model.config, prompt.model.config.layers[layer]
    normed = prompt.norm(x, prompt.model.weights.layers[layer].attention_norm)
    keys = prompt.cache_keys(layer, normed)[0][0, head // (sizes.heads // sizes.kv_heads)]
    scores = prompt.queries(layer, normed)[0, head].float() @ keys.float().T * config.attention_scale
    if config.attention_softcap is not None:
        scores = torch.tanh(scores / config.attention_softcap) * config.attention_softcap
    return scores.masked_fill(~prompt.visible(layer), float("-inf")).softmax(-1).cpu()

"""Gemma 1 and 1.1: one norm before each branch, and the branch joins the stream as it comes."""

from __future__ import annotations

import torch

from runtime import kernels
from runtime.families.chunk import BaseChunk
from runtime.families.state import DecodeState
from runtime.model.model import Model


def prefill_layers(chunk: BaseChunk, x: torch.Tensor) -> torch.Tensor:
    """Takes the embeddings [1, seq, hidden] of a chunk through all layers, filling the cache."""
    for index, layer in enumerate(chunk.model.weights.layers):
        x = x + chunk.attention(index, chunk.norm(x, layer.attention_norm))
        x = x + chunk.mlp(layer, chunk.norm(x, layer.mlp_norm))
    return x


def decode(model: Model, state: DecodeState) -> None:
    """Takes the rows' embeddings in state.x through all layers and picks state.token."""
    config, x = model.config, state.x
    eps = config.rms_norm_eps
    for index, layer in enumerate(model.weights.layers):
        cos, sin = model.rope.for_layer(index)
        kernels.qkv_projection(state.qkv, x, layer.attention_norm, layer.qkv, eps=eps, splits=config.qkv_splits)
        kernels.decode_attention(
            state.attention,
            state.cache.keys[index],
            state.cache.values[index],
            state.qkv,
            state.position,
            cos,
            sin,
            heads=config.heads,
            scale=config.attention_scale,
        )
        kernels.output_projection(x, state.attention, state.position, layer.output, heads=config.heads, residual=x)
        kernels.gated_mlp(state.mlp, x, layer.mlp_norm, layer.gate_up, eps=eps)
        kernels.residual_linear(x, state.mlp, layer.down, residual=x)
    weights = model.weights
    kernels.lm_head_argmax(
        state.token,
        x,
        weights.final_norm,
        weights.head,
        eps=eps,
        logits=state.logits,
        scratch=state.best,
    )

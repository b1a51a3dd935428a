"""Gemma 1 and 1.1: one norm before each branch, whose output is added to the residual as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from runtime.families.chunk import BaseChunk
from runtime.families.head import Residual
from runtime.families.state import DecodeState
from runtime.kernels.ops import Ops
from runtime.model.model import Model


def prefill_layers(chunk: BaseChunk, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Takes the embeddings [1, seq, hidden] of a chunk through the layers, filling the cache; yields the residual
    [1, seq, hidden] after each, but after the last one only if it is wanted."""
    for index, layer in enumerate(chunk.model.weights.layers):
        normed = chunk.norm(x, layer.attention_norm)
        if chunk.only_caches(index):
            chunk.cache_keys(index, normed)
        else:
            x = x + chunk.attention(index, normed)
            x = x + chunk.mlp(layer, chunk.norm(x, layer.mlp_norm))
        yield x


def decode_layers(ops: Ops, model: Model, state: DecodeState, attention: Callable[..., None]) -> Residual:
    """Takes the rows' embeddings in state.x through all layers; as sandwich.decode_layers."""
    config, x, normed = model.config, state.x, state.normed_of(state.batch)
    eps = config.rms_norm_eps
    for index, layer in enumerate(model.weights.layers):
        sizes, (cos, sin) = config.layers[index], model.rope.for_layer(index)
        qkv, attended = state.qkv_of(sizes), state.attended_of(sizes)
        ops.qkv_projection(qkv, x, layer.attention_norm, layer.qkv, eps=eps, widths=sizes.qkv_widths, normed=normed)
        attention(
            attended,
            state.cache.keys[index],
            state.cache.values[index],
            qkv,
            state.position,
            cos,
            sin,
            heads=sizes.heads,
            scale=config.attention_scale,
            splits=state.splits_of(sizes),
        )
        ops.residual_linear(x, attended, layer.output, residual=x)
        ops.gated_mlp(state.mlp, x, layer.mlp_norm, layer.gate_up, eps=eps, normed=normed)
        ops.residual_linear(x, state.mlp, layer.down, residual=x)
    return {"x": x, "branch": None, "branch_norm": None}

"""Gemma 3, text: as Gemma 2, with norms on queries and keys, most layers sliding, a rotary base of their own for
those, and plain attention without a cap on scores.

As in Gemma 2, a branch joins the stream at the start of the next kernel of a decode step.
"""

from __future__ import annotations

import torch

from runtime import kernels
from runtime.families.chunk import BaseChunk
from runtime.families.state import DecodeState
from runtime.model.model import Model


def prefill_layers(chunk: BaseChunk, x: torch.Tensor) -> torch.Tensor:
    """Takes the embeddings [1, seq, hidden] of a chunk through all layers, filling the cache."""
    for index, layer in enumerate(chunk.model.weights.layers):
        branch = chunk.attention(index, chunk.norm(x, layer.attention_norm))
        x = x + chunk.norm(branch, layer.post_attention_norm)
        branch = chunk.mlp(layer, chunk.norm(x, layer.mlp_norm))
        x = x + chunk.norm(branch, layer.post_mlp_norm)
    return x


def decode(model: Model, state: DecodeState) -> None:
    """Takes the rows' embeddings in state.x through all layers and picks state.token."""
    config, branch = model.config, state.branch
    eps = config.rms_norm_eps
    x, spare = state.x, state.x_alt
    post_mlp_norm = None
    for index, layer in enumerate(model.weights.layers):
        cos, sin = model.rope.for_layer(index)
        if post_mlp_norm is None:
            kernels.qkv_projection(state.qkv, x, layer.attention_norm, layer.qkv, eps=eps, splits=config.qkv_splits)
        else:
            kernels.qkv_projection(
                state.qkv,
                x,
                layer.attention_norm,
                layer.qkv,
                eps=eps,
                splits=config.qkv_splits,
                branch=branch,
                branch_norm=post_mlp_norm,
                x_out=spare,
            )
            x, spare = spare, x
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
            eps=eps,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            window=config.windows[index],
        )
        kernels.output_projection(
            branch, state.attention, state.position, layer.output, heads=config.heads, window=config.windows[index]
        )
        kernels.gated_mlp(
            state.mlp,
            x,
            layer.mlp_norm,
            layer.gate_up,
            eps=eps,
            branch=branch,
            branch_norm=layer.post_attention_norm,
            x_out=spare,
        )
        x, spare = spare, x
        kernels.residual_linear(branch, state.mlp, layer.down)
        post_mlp_norm = layer.post_mlp_norm
    kernels.lm_head_argmax(
        state.token,
        x,
        model.weights.final_norm,
        model.weights.head,
        eps=eps,
        softcap=config.final_softcap,
        branch=branch,
        branch_norm=post_mlp_norm,
        logits=state.logits,
        scratch=state.best,
    )

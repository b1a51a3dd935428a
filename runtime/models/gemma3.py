"""Gemma 3, text: as Gemma 2, with norms on queries and keys, most layers sliding, a rotary base of their own for
those, and plain attention without a cap on scores.

As in Gemma 2, a branch is added to the residual at the start of the next kernel of a decode step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from runtime.kernels.ops import Ops
from runtime.models.chunk import BaseChunk

if TYPE_CHECKING:
    from runtime.load import Model
    from runtime.state import DecodeState


def prefill_layers(chunk: BaseChunk, x: torch.Tensor) -> torch.Tensor:
    """Takes the embeddings [1, seq, hidden] of a chunk through all layers, filling the cache."""
    for index, layer in enumerate(chunk.model.weights.layers):
        branch = chunk.attention(index, chunk.norm(x, layer.attention_norm))
        x = x + chunk.norm(branch, layer.post_attention_norm)
        branch = chunk.mlp(layer, chunk.norm(x, layer.mlp_norm))
        x = x + chunk.norm(branch, layer.post_mlp_norm)
    return x


def decode(ops: Ops, model: Model, state: DecodeState) -> None:
    """Takes the rows' embeddings in state.x through all layers and picks state.token."""
    config, branch = model.config, state.branch
    eps = config.rms_norm_eps
    x, spare = state.x, state.x_alt
    post_mlp_norm = None
    for index, layer in enumerate(model.weights.layers):
        cos, sin = model.rope.for_layer(index)
        if post_mlp_norm is None:
            ops.qkv_projection(state.qkv, x, layer.attention_norm, layer.qkv, eps=eps, widths=config.qkv_splits)
        else:
            ops.qkv_projection(
                state.qkv,
                x,
                layer.attention_norm,
                layer.qkv,
                eps=eps,
                widths=config.qkv_splits,
                branch=branch,
                branch_norm=post_mlp_norm,
                residual_out=spare,
            )
            x, spare = spare, x
        ops.decode_attention(
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
        ops.output_projection(
            branch, state.attention, state.position, layer.output, heads=config.heads, window=config.windows[index]
        )
        ops.gated_mlp(
            state.mlp,
            x,
            layer.mlp_norm,
            layer.gate_up,
            eps=eps,
            branch=branch,
            branch_norm=layer.post_attention_norm,
            residual_out=spare,
        )
        x, spare = spare, x
        ops.residual_linear(branch, state.mlp, layer.down)
        post_mlp_norm = layer.post_mlp_norm
    ops.lm_head_argmax(
        state.token,
        x,
        model.weights.final_norm,
        model.weights.head,
        eps=eps,
        softcap=config.final_softcap,
        branch=branch,
        branch_norm=post_mlp_norm,
        logits=state.logits,
        argmax_keys=state.argmax_keys,
    )

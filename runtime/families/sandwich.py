"""Layers with a norm before and after each branch, as Gemma 2 and 3 have them.

A norm after a branch needs the branch's whole row, so in a decode step the branch is added to the residual at the start
of the next kernel. That kernel reads the residual from one buffer and writes the sum to the other (x and spare, which
then swap). What a family lacks (Gemma 2 the norms on queries and keys, Gemma 3 the softcaps) is None in its weights or
its config.
"""

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
            branch = chunk.attention(index, normed)
            x = x + chunk.norm(branch, layer.post_attention_norm)
            branch = chunk.mlp(layer, chunk.norm(x, layer.mlp_norm))
            x = x + chunk.norm(branch, layer.post_mlp_norm)
        yield x


def decode_layers(ops: Ops, model: Model, state: DecodeState, attention: Callable[..., None]) -> Residual:
    """Takes the rows' embeddings in state.x through all layers.

    Args:
        ops: the backend.
        model: the model.
        state: its buffers and its cache are written.
        attention: ops.decode_attention, or a function with its arguments that lets rows see other keys.

    Returns:
        What `pick_token` takes.
    """
    config, branch, normed = model.config, state.branch, state.normed_of(state.batch)
    eps = config.rms_norm_eps
    x, spare = state.x, state.x_alt
    post_mlp_norm = None
    for index, layer in enumerate(model.weights.layers):
        sizes, (cos, sin) = config.layers[index], model.rope.for_layer(index)
        qkv, attended = state.qkv_of(sizes), state.attended_of(sizes)
        if post_mlp_norm is None:
            ops.qkv_projection(qkv, x, layer.attention_norm, layer.qkv, eps=eps, widths=sizes.qkv_widths, normed=normed)
        else:
            ops.qkv_projection(
                qkv,
                x,
                layer.attention_norm,
                layer.qkv,
                eps=eps,
                widths=sizes.qkv_widths,
                branch=branch,
                branch_norm=post_mlp_norm,
                residual_out=spare,
                normed=normed,
            )
            x, spare = spare, x
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
            eps=eps,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            window=sizes.window,
            softcap=config.attention_softcap,
            splits=state.splits_of(sizes),
        )
        ops.residual_linear(branch, attended, layer.output)
        ops.gated_mlp(
            state.mlp,
            x,
            layer.mlp_norm,
            layer.gate_up,
            eps=eps,
            branch=branch,
            branch_norm=layer.post_attention_norm,
            residual_out=spare,
            normed=normed,
        )
        x, spare = spare, x
        ops.residual_linear(branch, state.mlp, layer.down)
        post_mlp_norm = layer.post_mlp_norm
    return {"x": x, "branch": branch, "branch_norm": post_mlp_norm}

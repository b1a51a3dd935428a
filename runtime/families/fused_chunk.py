"""A chunk of a prompt on a GPU: library matrix products between fused kernels, ten launches a layer.

As in fixed_chunk.py, nothing but numbers in device memory depends on the prompt, so that a CUDA graph can hold it: the
kernels read row, start and count there. Older keys are read in place in the cache, as many as there are, so one graph
serves every start. What a family lacks is None in its weights or its config.
"""

from __future__ import annotations

import torch

from runtime.families.kv_cache import KVCache
from runtime.kernels.linear import linear_torch
from runtime.kernels.ops import Ops
from runtime.kernels.quantized import Matrix
from runtime.kernels.scaled_matrix import ScaledMatrix
from runtime.model.model import Model


def fused_layers(ops: Ops, model: Model, cache: KVCache, chunk: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Takes the embeddings of a chunk through the layers, filling the cache.

    Args:
        ops: the backend.
        model: the model.
        cache: of all rows; one row of it is written.
        chunk: [3] int64 on the device: row, start and count, 1 to seq.
        x: [seq, hidden], rows from `count` on are padding.

    Returns:
        The residual [seq, hidden] after the last layer; rows of padding are meaningless.
    """
    config, eps = model.config, model.config.rms_norm_eps
    branch: torch.Tensor | None = None
    branch_norm: torch.Tensor | None = None
    for index, layer in enumerate(model.weights.layers):
        sizes, (cos, sin) = config.layers[index], model.rope.for_layer(index)
        keys, values = cache.keys[index], cache.values[index]
        x, normed = _added_and_normed(ops, x, layer.attention_norm, branch, branch_norm, eps)
        qkv = _product(ops, normed, layer.qkv)
        ops.rotate_heads(
            qkv,
            chunk,
            cos,
            sin,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            eps=eps,
        )
        attended = x.new_empty(len(x), sizes.heads * sizes.head_dim)
        ops.chunk_attention(
            attended,
            keys,
            values,
            qkv,
            chunk,
            heads=sizes.heads,
            window=sizes.window,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        )
        ops.store_chunk(keys, values, qkv, chunk, heads=sizes.heads)
        branch = _product(ops, attended, layer.output)
        x, normed = _added_and_normed(ops, x, layer.mlp_norm, branch, layer.post_attention_norm, eps)
        mlp = x.new_empty(len(x), config.intermediate)
        ops.gated_product(mlp, _product(ops, normed, layer.gate_up))
        branch, branch_norm = _product(ops, mlp, layer.down), layer.post_mlp_norm
    return _added_and_normed(ops, x, model.weights.final_norm, branch, branch_norm, eps)[0]


def _product(ops: Ops, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    """A library's matrix product. A matrix of integers with scales is first written out as values in x's dtype: a chunk
    reads every weight once, whatever its length."""
    if isinstance(weight, ScaledMatrix):
        values = x.new_empty(weight.shape)
        ops.dequantize(values, weight)
        weight = values
    return linear_torch(x, weight)


def _added_and_normed(
    ops: Ops,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    branch: torch.Tensor | None,
    branch_norm: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual after a branch is added, if there is one, and its norm."""
    normed = torch.empty_like(x)
    added = None if branch is None else torch.empty_like(x)
    ops.residual_norm(normed, added, x, norm_weight, branch=branch, branch_norm=branch_norm, eps=eps)
    return x if added is None else added, normed

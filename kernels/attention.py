"""Attention of one sequence as Hugging Face computes it, for prefill and for decode_attention's plain PyTorch form.

    softmax(scale * q K^T) V

in fp32 inside PyTorch's fused attention (Gemma 1 and 3), or step by step with a cap on scores and a rounding to the
model's dtype after each operation (Gemma 2).
Source: sdpa_attention_forward and eager_attention_forward in transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def history(cache: torch.Tensor, end: int, count: int) -> torch.Tensor:
    """The `count` cached positions before `end`, oldest first.

    Args:
        cache: [rows, kv_heads, slots, head_dim]; position p lives in slot p % slots.
        end: one past the last position wanted.
        count: how many, at most slots.

    Returns:
        [rows, kv_heads, count, head_dim]: a view, or a copy where the ring wraps inside the range.
    """
    slots = cache.shape[2]
    first = (end - count) % slots
    if first + count <= slots:
        return cache[:, :, first : first + count]
    return torch.cat((cache[:, :, first:], cache[:, :, : first + count - slots]), dim=2)


def attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of sequences in Hugging Face's own calls, which differ with the mask and the number of queries.

    Args:
        q: [batch, heads, queries, head_dim], after rotary embedding.
        k, v: [batch, kv_heads, keys, head_dim].
        scale: multiplies QK^T.
        mask: bool [1, 1, queries, keys], True where a query sees a key; None for causal attention with as many keys as
            queries, or for a single query that sees all. With and without a mask PyTorch takes different code, so a
            mask of ones is passed exactly where Hugging Face passes one. Without a softcap, a mask from `folded_mask`
            makes the heads that share a key head run as queries of a single head: the same sums, in larger products.
        softcap: scores become cap * tanh(scores / cap), rounding at each step (Gemma 2); None for none.

    Returns:
        [batch, queries, heads * head_dim].
    """
    batch, _, queries, head_dim = q.shape
    groups = q.shape[1] // k.shape[1]
    if softcap is not None:
        scores = torch.matmul(q, _repeat_heads(k, groups).transpose(2, 3)) * scale
        scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores + scores.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, _repeat_heads(v, groups))
        return out.transpose(1, 2).reshape(batch, queries, -1)

    grouped = groups > 1 and mask is None and head_dim <= 256
    if groups > 1 and not grouped:
        if queries == 1 or (mask is not None and mask.shape[2] > queries):
            q = q.reshape(batch, k.shape[1], groups * queries, head_dim)
        else:
            k, v = _repeat_heads(k, groups), _repeat_heads(v, groups)
    causal = mask is None and queries > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=grouped)
    return out.reshape(batch, -1, queries, head_dim).transpose(1, 2).reshape(batch, queries, -1)


def folded_mask(mask: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """A mask [1, 1, queries, keys] repeated for `groups` query heads that share a key head: [1, 1, groups * queries,
    keys], as the values in `dtype` that are added to scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf")).repeat(1, 1, groups, 1)


def _repeat_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    rows, kv_heads, keys, head_dim = x.shape
    if kv_heads == 1:  # a view will do
        return x.expand(rows, groups, keys, head_dim)
    if groups == 1:
        return x
    return x[:, :, None].expand(rows, kv_heads, groups, keys, head_dim).reshape(rows, -1, keys, head_dim)

"""Attention of one new query per row over its cached keys: q/k norm, rotary embedding, cache write, attention.

    q, k, v = the heads of a row of qkv
    q, k    = rms_norm(q, q_norm), rms_norm(k, k_norm)                      Gemma 3
    q, k    = rotary at the row's position: d(d(q * cos) + d(rotate_half(q) * sin))
    cache[position % slots] = k, v
    out     = softmax(scale * q K^T) V over the last min(position + 1, window) keys

d is the model's dtype. Gemma 1 and 3 keep scores in fp32 until the output. Gemma 2 caps them and rounds at every step:
QK^T -> d, * scale -> d, / cap -> d, tanh -> d, * cap -> d, softmax in fp32 -> d, . V -> d. The scale is applied after
QK^T, since it need not be a power of two. Query head h reads key head h // (heads / kv_heads).
Bytes moved: keys and values, 2 * kv_heads * head_dim * keys * sizeof(d) per row; the rest is a few KB.
Source: Gemma3Attention, Gemma2Attention and sdpa_attention_forward in transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from runtime.kernels.launch import check, check_rows, use_kernel
from runtime.kernels.rms_norm import rms_norm_reference


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of x [..., head_dim] by angles cos, sin [..., head_dim / 2].

    Each product and the sum round to d on their own. A subtraction stands for adding the negated half: same bits.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of one sequence in Hugging Face's own calls, which differ with the mask and the number of queries.

    Args:
        q: [1, heads, queries, head_dim], after rotary embedding.
        k, v: [1, kv_heads, keys, head_dim].
        scale: multiplies QK^T.
        mask: bool [1, 1, queries, keys], True where a query sees a key; None for causal attention with as many keys as
            queries, or for a single query that sees all. With and without a mask PyTorch takes different code, so a
            mask of ones is passed exactly where Hugging Face passes one.
        softcap: scores become cap * tanh(scores / cap), rounding at each step (Gemma 2); None for none.

    Returns:
        [1, queries, heads * head_dim].
    """
    queries, head_dim = q.shape[2:]
    groups = q.shape[1] // k.shape[1]
    if softcap is not None:
        scores = torch.matmul(q, _repeat_heads(k, groups).transpose(2, 3)) * scale
        scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores + torch.where(mask, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, _repeat_heads(v, groups))
        return out.transpose(1, 2).reshape(1, queries, -1)

    grouped = groups > 1 and mask is None and head_dim <= 256
    if groups > 1 and not grouped:
        if queries == 1:
            q = q.reshape(1, k.shape[1], groups, head_dim)
        else:
            k, v = _repeat_heads(k, groups), _repeat_heads(v, groups)
    causal = mask is None and queries > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=grouped)
    return out.reshape(1, -1, queries, head_dim).transpose(1, 2).reshape(1, queries, -1)


def _repeat_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    rows, kv_heads, keys, head_dim = x.shape
    if groups == 1:
        return x
    return x[:, :, None].expand(rows, kv_heads, groups, keys, head_dim).reshape(rows, -1, keys, head_dim)


def decode_attention_reference(
    out: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    qkv: torch.Tensor,
    position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads: int,
    scale: float,
    eps: float = 0.0,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Row by row, each over exactly the keys it sees, oldest first."""
    kv_heads, slots, head_dim = k_cache.shape[1:]
    for row, at in enumerate(position.tolist()):
        q, k, v = qkv[row].view(-1, 1, head_dim).split((heads, kv_heads, kv_heads))
        if q_norm is not None and k_norm is not None:
            q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
        rotated = rotary_reference(torch.cat((q, k)), cos[at], sin[at])
        k_cache[row, :, at % slots] = rotated[heads:, 0]
        v_cache[row, :, at % slots] = v[:, 0]

        count = at + 1 if window is None else min(at + 1, window)
        keys = history(k_cache[row : row + 1], at + 1, count)
        values = history(v_cache[row : row + 1], at + 1, count)
        mask = torch.ones(1, 1, 1, count, dtype=torch.bool, device=qkv.device) if count == window else None
        query = rotated[:heads].unsqueeze(0)
        out[row] = attention_reference(query, keys, values, scale=scale, mask=mask, softcap=softcap).view(-1)


def decode_attention(
    out: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    qkv: torch.Tensor,
    position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads: int,
    scale: float,
    eps: float = 0.0,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """Adds each row's new key and value to its cache and attends to what that row may see.

    Args:
        out: [rows, heads * head_dim], written.
        k_cache, v_cache: [at least rows, kv_heads, slots, head_dim]; slot position % slots of each row is written.
        qkv: [rows, (heads + 2 * kv_heads) * head_dim], 1 to 8 rows.
        position: [rows] int32, the new token's position in its row: the number of tokens already cached. At most
            len(cos) - 1, which only the host loop can promise.
        cos, sin: [max_seq_len, head_dim / 2], the rotary tables of this layer.
        heads: query heads, a multiple of kv_heads.
        scale: multiplies QK^T.
        eps: of the q/k norm.
        q_norm, k_norm: [head_dim] (multiplier 1 + weight), both or neither.
        window: keys that a query sees, itself included; None for all.
        softcap: Gemma 2's cap on scores; None for none.
        scratch: the kernel's workspace for splitting a long sequence; unused by the reference.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above, or the cache is too short
            for the window or the tables.
    """
    rows, width = check_rows("qkv", qkv)
    dtype, device = qkv.dtype, qkv.device
    if k_cache.dim() != 4 or k_cache.shape[0] < rows:
        raise ValueError(
            f"k_cache: expected [at least {rows}, kv_heads, slots, head_dim], got shape {tuple(k_cache.shape)}"
        )
    cache_shape = tuple(k_cache.shape)
    _, kv_heads, slots, head_dim = cache_shape
    if heads % kv_heads or width != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"qkv: expected (heads + 2 * kv_heads) * head_dim = ({heads} + 2 * {kv_heads}) * {head_dim} columns "
            f"and heads a multiple of kv_heads, got {width} columns"
        )
    check("k_cache", k_cache, cache_shape, dtype, device)
    check("v_cache", v_cache, cache_shape, dtype, device)
    check("out", out, (rows, heads * head_dim), dtype, device)
    check("position", position, (rows,), torch.int32, device)
    table_shape = (cos.shape[0], head_dim // 2)
    check("cos", cos, table_shape, dtype, device)
    check("sin", sin, table_shape, dtype, device)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm: expected both or neither, got one")
    if q_norm is not None:
        check("q_norm", q_norm, (head_dim,), dtype, device)
        check("k_norm", k_norm, (head_dim,), dtype, device)
    needed = table_shape[0] if window is None else min(window, table_shape[0])
    if slots < needed:
        raise ValueError(f"k_cache: expected at least {needed} slots, got {slots}")
    if use_kernel(qkv):
        raise NotImplementedError("decode_attention has no Triton kernel yet")
    decode_attention_reference(
        out,
        k_cache,
        v_cache,
        qkv,
        position,
        cos,
        sin,
        heads=heads,
        scale=scale,
        eps=eps,
        q_norm=q_norm,
        k_norm=k_norm,
        window=window,
        softcap=softcap,
    )

"""Attention of one new query per row over its cached keys: q/k norm, rotary embedding, cache write, attention.

    q, k, v = the heads of a row of qkv
    q, k    = rms_norm(q, q_norm), rms_norm(k, k_norm)                      Gemma 3
    q, k    = rotary at the row's position: d(d(q * cos) + d(rotate_half(q) * sin))
    cache[position % slots] = k, v
    out     = softmax(scale * q K^T) V over the last min(position + 1, window) keys

d is the model's dtype. Gemma 1 and 3 keep scores in fp32 until the output. Gemma 2 caps them and rounds at every step:
QK^T -> d, * scale -> d, / cap -> d, tanh -> d, * cap -> d, softmax in fp32 -> d, . V -> d. The scale is applied after
QK^T, since it need not be a power of two. Query head h reads key head h // (heads / kv_heads).
One program for each run of keys leaves a part of the output in fp32; output_projection joins them (attention_runs.py).
Bytes moved: keys and values, 2 * kv_heads * head_dim * keys * sizeof(d) per row; the parts stay in L2.
Source: Gemma3Attention, Gemma2Attention and sdpa_attention_forward in transformers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.attention_reference import attention_reference, history
from runtime.kernels.attention_runs import BLOCK_KEYS, MAX_RUNS, AttentionParts, check_parts, cut
from runtime.kernels.checks import check, check_rows
from runtime.kernels.cpu.calls import capture, scratch
from runtime.kernels.launch import launch, let_next_kernel_start, use_kernel, wait_for_previous_kernel
from runtime.kernels.rms_norm import rms_norm_reference
from runtime.kernels.rotary import rotary_reference, rotated_halves
from runtime.kernels.softcap import tanh

WARPS = 8
# Query heads of one key head, padded to the tensor cores' height.
GROUP_ROWS = 16


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
    if q_norm is not None and k_norm is not None:
        norm = torch.cat((q_norm.expand(heads, -1), k_norm.expand(kv_heads, -1)))
    for row, at in enumerate(position.tolist()):
        states = qkv[row].view(-1, head_dim)
        turned, new_values = states[: heads + kv_heads], states[heads + kv_heads :]
        if q_norm is not None:
            turned = rms_norm_reference(turned, norm, eps)
        turned = rotary_reference(turned, cos[at], sin[at])
        k_cache[row, :, at % slots] = turned[heads:]
        v_cache[row, :, at % slots] = new_values

        count = at + 1 if window is None else min(at + 1, window)
        keys = history(k_cache[row : row + 1], at + 1, count)
        values = history(v_cache[row : row + 1], at + 1, count)
        mask = torch.ones(1, 1, 1, count, dtype=torch.bool, device=qkv.device) if count == window else None
        query = turned[:heads].view(1, heads, 1, head_dim)
        out[row] = attention_reference(query, keys, values, scale=scale, mask=mask, softcap=softcap).view(-1)


@triton.jit
def normed_halves(first, second, weight_ptr, half, HALF_DIM: tl.constexpr, eps, dtype: tl.constexpr):
    """RMSNorm over heads held as two halves [..., HALF_DIM], fp32 in and out, rounded to the model's dtype."""
    total = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    inverse = tl.rsqrt(total / (2 * HALF_DIM) + eps)[:, None]
    mask = half < HALF_DIM
    first_weight = 1.0 + tl.load(weight_ptr + half, mask=mask, other=0.0).to(tl.float32)[None, :]
    second_weight = 1.0 + tl.load(weight_ptr + HALF_DIM + half, mask=mask, other=0.0).to(tl.float32)[None, :]
    first = (first * inverse * first_weight).to(dtype).to(tl.float32)
    second = (second * inverse * second_weight).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def finished_scores(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    """Scale and cap. Without a cap scores stay in fp32; Gemma 2's eager attention rounds after every operation."""
    if HAS_SOFTCAP:
        scores = (scores.to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32)
        scores = tanh((scores / softcap).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        return (scores * softcap).to(dtype).to(tl.float32)
    else:
        return scores * scale


@triton.jit
def cached_block(k_ptr, v_ptr, start, end, slots, half, dim, HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Keys, as two halves [BLOCK_KEYS, BLOCK_HALF], and values [BLOCK_KEYS, BLOCK_DIM] of positions start to end."""
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    keys = start + tl.arange(0, BLOCK_KEYS)
    at = (keys % slots)[:, None] * HEAD_DIM
    seen = (keys < end)[:, None]
    k_mask = seen & (half < HALF_DIM)[None, :]
    k1 = tl.load(k_ptr + at + half[None, :], mask=k_mask, other=0.0)
    k2 = tl.load(k_ptr + at + HALF_DIM + half[None, :], mask=k_mask, other=0.0)
    v = tl.load(v_ptr + at + dim[None, :], mask=seen & (dim < HEAD_DIM)[None, :], other=0.0)
    return k1, k2, v


@triton.jit(do_not_specialize=["slots", "window"])
def decode_attention_kernel(
    partial_ptr,
    stats_ptr,
    k_cache_ptr,
    v_cache_ptr,
    qkv_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots,
    window,
    scale,
    eps,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    MAX_RUNS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # One program takes one run of one row's keys under one key head, with all the query heads that share it.
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    HEADS: tl.constexpr = KV_HEADS * GROUP
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    row = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    index = tl.program_id(1)
    group = tl.arange(0, GROUP_ROWS)
    half = tl.arange(0, BLOCK_HALF)
    dim = tl.arange(0, BLOCK_DIM)
    heads = kv_head * GROUP + group
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)

    # Before the wait: the position and the keys and values of earlier steps, which nothing in this step changes. They
    # are there to be read because qkv_projection lets this kernel start only after its own wait.
    position = tl.load(position_ptr + row)
    length, run, runs = cut(position, window, MAX_RUNS, BLOCK_KEYS)
    if index < runs:
        begin = position + 1 - length + index * run
        end = tl.minimum(begin + run, position)  # the new key itself is not read back from the cache
        cache_row = (row * KV_HEADS + kv_head).to(tl.int64) * slots * HEAD_DIM
        k1, k2, v = cached_block(
            k_cache_ptr + cache_row, v_cache_ptr + cache_row, begin, end, slots, half, dim, HEAD_DIM, BLOCK_KEYS
        )
        cos = tl.load(cos_ptr + position * HALF_DIM + half, mask=half < HALF_DIM, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + position * HALF_DIM + half, mask=half < HALF_DIM, other=0.0).to(tl.float32)[None, :]
        wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)

        qkv_row = qkv_ptr + row * (HEADS + 2 * KV_HEADS) * HEAD_DIM
        q_at = qkv_row + heads[:, None] * HEAD_DIM + half[None, :]
        q_mask = (group < GROUP)[:, None] & (half < HALF_DIM)[None, :]
        q1 = tl.load(q_at, mask=q_mask, other=0.0).to(tl.float32)  # [GROUP_ROWS, BLOCK_HALF]
        q2 = tl.load(q_at + HALF_DIM, mask=q_mask, other=0.0).to(tl.float32)
        if HAS_QK_NORM:
            q1, q2 = normed_halves(q1, q2, q_norm_ptr, half, HALF_DIM, eps, dtype)
        q1, q2 = rotated_halves(q1, q2, cos, sin, dtype)

        highest = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
        mixed = tl.zeros([GROUP_ROWS, BLOCK_DIM], tl.float32)
        if index == runs - 1:
            # The run that ends with the new key: make it, cache it, and start from it.
            new_k_at = qkv_row + (HEADS + kv_head) * HEAD_DIM + half[None, :]
            new_k_mask = (half < HALF_DIM)[None, :]
            new_k1 = tl.load(new_k_at, mask=new_k_mask, other=0.0).to(tl.float32)  # [1, BLOCK_HALF]
            new_k2 = tl.load(new_k_at + HALF_DIM, mask=new_k_mask, other=0.0).to(tl.float32)
            if HAS_QK_NORM:
                new_k1, new_k2 = normed_halves(new_k1, new_k2, k_norm_ptr, half, HALF_DIM, eps, dtype)
            new_k1, new_k2 = rotated_halves(new_k1, new_k2, cos, sin, dtype)
            new_v = tl.load(qkv_row + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
            new_at = cache_row + (position % slots) * HEAD_DIM
            tl.store(k_cache_ptr + new_at + half[None, :], new_k1, mask=new_k_mask)
            tl.store(k_cache_ptr + new_at + HALF_DIM + half[None, :], new_k2, mask=new_k_mask)
            tl.store(v_cache_ptr + new_at + dim, new_v, mask=dim < HEAD_DIM)
            scores = tl.sum(q1.to(tl.float32) * new_k1.to(tl.float32), axis=1)
            scores += tl.sum(q2.to(tl.float32) * new_k2.to(tl.float32), axis=1)
            highest = finished_scores(scores, scale, softcap, HAS_SOFTCAP, dtype)
            total += 1.0
            mixed += new_v.to(tl.float32)[None, :]

        for start in range(begin, end, BLOCK_KEYS):
            scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")  # [GROUP_ROWS, BLOCK_KEYS]
            scores = finished_scores(scores, scale, softcap, HAS_SOFTCAP, dtype)
            seen = start + tl.arange(0, BLOCK_KEYS) < end
            scores = tl.where(seen[None, :], scores, float("-inf"))
            raised = tl.maximum(highest, tl.max(scores, axis=1))
            shrink = tl.exp(highest - raised)
            weights = tl.exp(scores - raised[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            mixed = tl.dot(weights.to(dtype), v, mixed * shrink[:, None], input_precision="ieee")
            highest = raised
            if start + BLOCK_KEYS < end:
                k1, k2, v = cached_block(
                    k_cache_ptr + cache_row,
                    v_cache_ptr + cache_row,
                    start + BLOCK_KEYS,
                    end,
                    slots,
                    half,
                    dim,
                    HEAD_DIM,
                    BLOCK_KEYS,
                )

        part = row * MAX_RUNS + index
        part_at = partial_ptr + (part * HEADS + heads[:, None]) * HEAD_DIM + dim[None, :]
        tl.store(part_at, mixed / total[:, None], mask=(group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :])
        tl.store(stats_ptr + part * (2 * HEADS) + heads, highest, mask=group < GROUP)
        tl.store(stats_ptr + part * (2 * HEADS) + HEADS + heads, total, mask=group < GROUP)


def decode_attention(
    out: AttentionParts,
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
    """Adds each row's new key and value to its cache and attends to what that row may see.

    Args:
        out: written, for output_projection: the runs' parts by the kernel, the joined result by the reference.
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
    check_parts("out", out, rows, heads * head_dim, heads, qkv)
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
        groups = heads // kv_heads
        if groups > GROUP_ROWS:
            raise ValueError(f"heads: expected at most {GROUP_ROWS} query heads a key head, got {groups}")
        block_keys = BLOCK_KEYS[dtype.itemsize]
        launch(
            decode_attention_kernel,
            (rows * kv_heads, min(MAX_RUNS, triton.cdiv(needed, block_keys))),
            device,
            WARPS,
            out.partial,
            out.stats,
            k_cache,
            v_cache,
            qkv,
            position,
            cos,
            sin,
            q_norm,
            k_norm,
            slots,
            needed,
            scale,
            eps,
            softcap or 1.0,
            KV_HEADS=kv_heads,
            GROUP=groups,
            HEAD_DIM=head_dim,
            HAS_QK_NORM=q_norm is not None,
            HAS_SOFTCAP=softcap is not None,
            MAX_RUNS=MAX_RUNS,
            GROUP_ROWS=GROUP_ROWS,
            BLOCK_KEYS=block_keys,
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            BLOCK_DIM=triton.next_power_of_2(head_dim),
        )
        return
    if capture(
        "decode_attention",
        out.joined,
        scratch(3, len(qkv), heads, k_cache.shape[2]),
        k_cache,
        v_cache,
        qkv,
        position,
        cos,
        sin,
        q_norm,
        k_norm,
        heads,
        needed,
        scale,
        eps,
        softcap,
    ):
        return
    decode_attention_reference(
        out.joined,
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

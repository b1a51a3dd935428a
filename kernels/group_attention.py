"""The kernel of decode_attention for models of more than one row: all query heads that share a key head form one tile
for tensor cores, so that a row's keys are read once for all of them.

Formula, roundings and bytes moved are decode_attention's. sequence_attention, whose rows are successive positions of
one sequence, uses this kernel too, and launches it twice: for the rows' new keys, and then for the older ones, the
newest of which are those of the rows before. Which splits a launch takes is known only at run time, so that both
launches run one program, and the compiler has no reason to arrange its arithmetic differently from a decode step's.
"""

from __future__ import annotations

from runtime.kernels.attention_splits import planned_splits
from runtime.kernels.launch import let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.rotary import rotated_halves
from runtime.kernels.softcap import finished_scores
from runtime.kernels.triton_function import jit, tl

GROUP_WARPS = 8


@jit
def normed_halves(first, second, weight_ptr, half, HALF_DIM: tl.constexpr, eps, dtype: tl.constexpr):
    """RMSNorm over heads held as two halves [..., BLOCK_HALF], fp32 in and out, rounded to the model's dtype."""
    total = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    inverse = tl.rsqrt(total / (2 * HALF_DIM) + eps)[:, None]
    mask = half < HALF_DIM
    first_weight = 1.0 + tl.load(weight_ptr + half, mask=mask, other=0.0).to(tl.float32)[None, :]
    second_weight = 1.0 + tl.load(weight_ptr + HALF_DIM + half, mask=mask, other=0.0).to(tl.float32)[None, :]
    first = (first * inverse * first_weight).to(dtype).to(tl.float32)
    second = (second * inverse * second_weight).to(dtype).to(tl.float32)
    return first, second


@jit
def cached_block(k_ptr, v_ptr, start, end, slots, half, dim, HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Keys, as two halves [BLOCK_KEYS, BLOCK_HALF], and values [BLOCK_KEYS, BLOCK_DIM] of positions start to end."""
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    keys = start + tl.arange(0, BLOCK_KEYS)
    at = (keys % slots)[:, None] * HEAD_DIM
    valid = (keys < end)[:, None]
    k_mask = valid & (half < HALF_DIM)[None, :]
    k1 = tl.load(k_ptr + at + half[None, :], mask=k_mask, other=0.0)
    k2 = tl.load(k_ptr + at + HALF_DIM + half[None, :], mask=k_mask, other=0.0)
    v = tl.load(v_ptr + at + dim[None, :], mask=valid & (dim < HEAD_DIM)[None, :], other=0.0)
    return k1, k2, v


@jit
def sequence_block(
    k_ptr,
    v_ptr,
    new_k_ptr,
    new_v_ptr,
    start,
    end,
    first_new,
    slots,
    half,
    dim,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The same where positions from first_new on belong to the step's own rows, and are not in the cache yet."""
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    cached_end = tl.minimum(end, first_new)
    k1, k2, v = cached_block(k_ptr, v_ptr, start, cached_end, slots, half, dim, HEAD_DIM, BLOCK_KEYS)
    keys = start + tl.arange(0, BLOCK_KEYS)
    at = (keys - first_new)[:, None] * (KV_HEADS * HEAD_DIM)
    is_new = ((keys >= first_new) & (keys < end))[:, None]
    k_mask = is_new & (half < HALF_DIM)[None, :]
    k1 = tl.load(new_k_ptr + at + half[None, :], mask=k_mask, other=k1)
    k2 = tl.load(new_k_ptr + at + HALF_DIM + half[None, :], mask=k_mask, other=k2)
    v = tl.load(new_v_ptr + at + dim[None, :], mask=is_new & (dim < HEAD_DIM)[None, :], other=v)
    return k1, k2, v


@jit(do_not_specialize=["slots", "window", "row_splits", "first_split"])
def group_attention_kernel(
    partial_ptr,
    stats_ptr,
    k_cache_ptr,
    v_cache_ptr,
    new_keys_ptr,
    new_values_ptr,
    qkv_ptr,
    position_ptr,
    row_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots,
    window,
    row_splits,
    first_split,
    scale,
    eps,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_SEQUENCE: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    FEW_SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # One program takes all query heads of one row that share a key head over one split of its keys, on tensor cores.
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    GROUP: tl.constexpr = HEADS // KV_HEADS
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    row = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    index = tl.program_id(1)
    if IS_SEQUENCE:
        index += first_split
    group = tl.arange(0, GROUP_ROWS)
    half = tl.arange(0, BLOCK_HALF)
    dim = tl.arange(0, BLOCK_DIM)
    heads = kv_head * GROUP + group
    in_half = half < HALF_DIM
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)

    # Before the wait: as in decode_attention_kernel. In a sequence some older keys come from the launch before; and
    # where there are no older keys, some program must wait all the same.
    if IS_SEQUENCE:
        wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    position = tl.load(position_ptr + row)
    older, size, splits = planned_splits(position, window, FEW_SPLITS, SPLIT_KEYS, MOST_SPLITS, BLOCK_KEYS)
    if index <= splits:
        begin = position - older + (index - 1) * size
        end = tl.minimum(begin + size, position)
        cache_row = (row * KV_HEADS + kv_head).to(tl.int64) * slots * HEAD_DIM
        if IS_SEQUENCE:
            cache_row = (tl.load(row_ptr) * KV_HEADS + kv_head) * slots * HEAD_DIM
            new_k_ptr = new_keys_ptr + kv_head * HEAD_DIM
            new_v_ptr = new_values_ptr + kv_head * HEAD_DIM
            first_new = tl.load(position_ptr)
        k_ptr = k_cache_ptr + cache_row
        v_ptr = v_cache_ptr + cache_row
        # The first split is the new key alone: it reads nothing from the cache.
        first = tl.where(index == 0, end, begin)
        if not IS_SEQUENCE:
            k1, k2, v = cached_block(k_ptr, v_ptr, first, end, slots, half, dim, HEAD_DIM, BLOCK_KEYS)
        cos = tl.load(cos_ptr + position * HALF_DIM + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + position * HALF_DIM + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
        if not IS_SEQUENCE:
            wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)

        qkv_row = qkv_ptr + row * (HEADS + 2 * KV_HEADS) * HEAD_DIM
        q_at = qkv_row + heads[:, None] * HEAD_DIM + half[None, :]
        q_mask = (group < GROUP)[:, None] & in_half[None, :]
        q1 = tl.load(q_at, mask=q_mask, other=0.0).to(tl.float32)  # [GROUP_ROWS, BLOCK_HALF]
        q2 = tl.load(q_at + HALF_DIM, mask=q_mask, other=0.0).to(tl.float32)
        if HAS_QK_NORM:
            q1, q2 = normed_halves(q1, q2, q_norm_ptr, half, HALF_DIM, eps, dtype)
        q1, q2 = rotated_halves(q1, q2, cos, sin, dtype)

        highest = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
        acc = tl.zeros([GROUP_ROWS, BLOCK_DIM], tl.float32)
        if index == 0:
            new_k_at = qkv_row + (HEADS + kv_head) * HEAD_DIM + half[None, :]
            new_k1 = tl.load(new_k_at, mask=in_half[None, :], other=0.0).to(tl.float32)  # [1, BLOCK_HALF]
            new_k2 = tl.load(new_k_at + HALF_DIM, mask=in_half[None, :], other=0.0).to(tl.float32)
            if HAS_QK_NORM:
                new_k1, new_k2 = normed_halves(new_k1, new_k2, k_norm_ptr, half, HALF_DIM, eps, dtype)
            new_k1, new_k2 = rotated_halves(new_k1, new_k2, cos, sin, dtype)
            new_v = tl.load(qkv_row + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
            k_at, v_at, new_at = k_ptr, v_ptr, (position % slots) * HEAD_DIM
            if IS_SEQUENCE:
                k_at, v_at, new_at = new_k_ptr, new_v_ptr, row * (KV_HEADS * HEAD_DIM)
            tl.store(k_at + new_at + half[None, :], new_k1, mask=in_half[None, :])
            tl.store(k_at + new_at + HALF_DIM + half[None, :], new_k2, mask=in_half[None, :])
            tl.store(v_at + new_at + dim, new_v, mask=dim < HEAD_DIM)
            scores = tl.sum(q1.to(tl.float32) * new_k1.to(tl.float32), axis=1)
            scores += tl.sum(q2.to(tl.float32) * new_k2.to(tl.float32), axis=1)
            highest = finished_scores(scores, scale, softcap, HAS_SOFTCAP, dtype)
            total += 1.0
            acc += new_v.to(tl.float32)[None, :]
        for start in range(first, end, BLOCK_KEYS):
            if IS_SEQUENCE:  # no earlier: some compilers would run out of registers
                k1, k2, v = sequence_block(
                    k_ptr, v_ptr, new_k_ptr, new_v_ptr, start, end, first_new, slots, half, dim,
                    KV_HEADS, HEAD_DIM, BLOCK_KEYS,
                )  # fmt: skip
            scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")  # [GROUP_ROWS, BLOCK_KEYS]
            scores = finished_scores(scores, scale, softcap, HAS_SOFTCAP, dtype)
            valid = start + tl.arange(0, BLOCK_KEYS) < end
            scores = tl.where(valid[None, :], scores, float("-inf"))
            raised = tl.maximum(highest, tl.max(scores, axis=1))
            shrink = tl.exp(highest - raised)
            weights = tl.exp(scores - raised[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(dtype), v, acc * shrink[:, None], input_precision="ieee")
            highest = raised
            if not IS_SEQUENCE:
                if start + BLOCK_KEYS < end:
                    after = start + BLOCK_KEYS
                    k1, k2, v = cached_block(k_ptr, v_ptr, after, end, slots, half, dim, HEAD_DIM, BLOCK_KEYS)

        split = row * row_splits + index
        partial_at = partial_ptr + (split * HEADS + heads[:, None]) * HEAD_DIM + dim[None, :]
        tl.store(partial_at, acc, mask=(group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :])
        tl.store(stats_ptr + split * (2 * HEADS) + heads, highest, mask=group < GROUP)
        tl.store(stats_ptr + split * (2 * HEADS) + HEADS + heads, total, mask=group < GROUP)

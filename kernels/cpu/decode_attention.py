"""The CPU form of decode_attention, in three phases: scores, softmax, weighted sum of the values."""

import numpy as np

from runtime.kernels.cpu.arithmetic import capped, dot_products, exp, narrow, norm, rounded, widen
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.sharing import MAX_CHUNKS, THREADS, begin_publish, claim, end_publish, share
from runtime.kernels.cpu.vectors import BLOCK, accumulate_values


@compiled
def rotated_head(out, head, norm_weight, cos, sin, eps):
    """out = a query or key head [head_dim] after its norm (Gemma 3) and rotary embedding, in fp32."""
    for dim in range(len(head)):
        out[dim] = widen(head[dim], head)
    if norm_weight is not None:
        norm(out, out, norm_weight, eps, head)
    half = len(head) // 2
    for dim in range(half):
        low, high = out[dim], out[half + dim]
        c, s = widen(cos[dim], cos), widen(sin[dim], sin)
        out[dim] = rounded(rounded(low * c, head) - rounded(high * s, head), head)
        out[half + dim] = rounded(rounded(high * c, head) + rounded(low * s, head), head)


@compiled
def softmax(scores, softcap, scale, like):
    """Turns dot products into attention weights, in place. Returns what the weighted sum is to be divided by."""
    highest = np.float32(-np.inf)
    for key in range(len(scores)):
        if softcap is None:
            scores[key] = scores[key] * scale
        else:  # eager attention rounds after every operation
            scores[key] = capped(rounded(rounded(scores[key], like) * scale, like), softcap, like)
        highest = max(highest, scores[key])
    total = np.float32(0.0)
    for key in range(len(scores)):
        scores[key] = exp(scores[key] - highest)
    for key in range(len(scores)):
        total += scores[key]
    for key in range(len(scores)):  # PyTorch's fused attention rounds before it divides
        scores[key] = rounded(scores[key] if softcap is None else scores[key] / total, like)
    return total if softcap is None else np.float32(1.0)


@compiled
def accumulate_ring(out, weights, start, values, slot, count, dim):
    """out += the sum over i < count, in order, of weights[:, start + i] * values[(slot + i) % slots], for the block of
    columns that starts at `dim`.

    out [heads, head_dim] and weights [heads, at least start + count] are fp32, values [slots, head_dim] of the model's
    dtype.
    """
    slots, head_dim = values.shape
    end = start + count
    while start < end:  # twice if the ring wraps around
        length = min(end - start, slots - slot)
        head = 0
        if head_dim - dim >= BLOCK:
            while len(out) - head >= 4:
                accumulate_values(out, weights, start, values, slot, length, dim, head, 4)
                head += 4
            if len(out) - head >= 2:
                accumulate_values(out, weights, start, values, slot, length, dim, head, 2)
                head += 2
            if len(out) > head:
                accumulate_values(out, weights, start, values, slot, length, dim, head, 1)
        else:
            for key in range(length):
                for head in range(len(out)):
                    for column in range(dim, head_dim):
                        out[head, column] += weights[head, start + key] * widen(values[slot + key, column], values)
        start, slot = start + length, 0


@compiled
def decode_attention(
    team, thread, partial, stats, scratch, k_cache, v_cache, qkv, position, cos, sin, q_norm, k_norm,
    heads, window, scale, eps, softcap,
):  # fmt: skip
    kv_heads, slots, head_dim = k_cache.shape[1:]
    rows, groups, units = len(qkv), heads // kv_heads, len(qkv) * kv_heads
    scores, weights, totals = scratch[0], scratch[1], scratch[2]
    positions = position.copy()  # other threads may start the next step before this one is done
    queries = np.empty((rows, heads, head_dim), np.float32)
    new_keys = np.empty((rows, kv_heads, 1, head_dim), k_cache.dtype)
    rotated = np.empty(head_dim, np.float32)
    for row in range(rows):
        at, states = positions[row], qkv[row].reshape(heads + 2 * kv_heads, head_dim)
        for head in range(heads):
            rotated_head(queries[row, head], states[head], q_norm, cos[at], sin[at], eps)
        for kv_head in range(kv_heads):
            rotated_head(rotated, states[heads + kv_head], k_norm, cos[at], sin[at], eps)
            for dim in range(head_dim):
                new_keys[row, kv_head, 0, dim] = narrow(rotated[dim], k_cache)

    # Scores: a chunk is a split of one key head's keys, for all its queries. The number of chunks must not depend on
    # the position, which a late thread may read after it has changed.
    splits = max(1, min(4 * team[THREADS], slots // 32, (MAX_CHUNKS - 1) // units))
    dots, own_scores = np.empty((1, groups), np.float32), np.empty((groups, slots // splits + 1), np.float32)
    last = units * splits
    chunk = claim(team, thread, last + 1)
    while chunk >= 0:
        unit = min(chunk, last - 1) // splits
        row, kv_head = unit // kv_heads, unit % kv_heads
        count = min(positions[row] + 1, window)
        oldest = positions[row] + 1 - count
        first, end = share(count, chunk % splits, splits)
        if chunk == last:  # the new key and value go into the cache
            end = first
        group = queries[row, kv_head * groups : (kv_head + 1) * groups]
        for key in range(first, end):
            if key == count - 1:
                dot_products(dots, 1, new_keys[row, kv_head], 0, group)
            else:
                dot_products(dots, 1, k_cache[row, kv_head], (oldest + key) % slots, group)
            for head in range(groups):
                own_scores[head, key - first] = dots[0, head]
        if begin_publish(team, thread, chunk):
            for head in range(groups):
                for key in range(first, end):
                    scores[row, kv_head * groups + head, key] = own_scores[head, key - first]
            if chunk == last:
                for row in range(rows):
                    stats[row, :, 0], stats[row, :, 1] = -np.inf, np.float32(0.0)
                    stats[row, 0, 0], stats[row, 0, 1] = np.float32(0.0), np.float32(1.0)
                    states = qkv[row].reshape(heads + 2 * kv_heads, head_dim)
                    for kv_head in range(kv_heads):
                        for dim in range(head_dim):
                            k_cache[row, kv_head, positions[row] % slots, dim] = new_keys[row, kv_head, 0, dim]
                            v_cache[row, kv_head, positions[row] % slots, dim] = states[heads + kv_heads + kv_head, dim]
            end_publish(team, thread, chunk)
        chunk = claim(team, thread, last + 1)

    unit = claim(team, thread, rows * heads)
    while unit >= 0:
        row, head = unit // heads, unit % heads
        count = min(positions[row] + 1, window)
        own_weights = scores[row, head, :count].copy()
        total = softmax(own_weights, softcap, scale, qkv)
        if begin_publish(team, thread, unit):
            totals[row, head, 0] = total
            for key in range(count):
                weights[row, head, key] = own_weights[key]
            end_publish(team, thread, unit)
        unit = claim(team, thread, rows * heads)

    blocks = (head_dim + BLOCK - 1) // BLOCK
    values_sum = np.empty((groups, head_dim), np.float32)
    unit = claim(team, thread, units * blocks)
    while unit >= 0:  # a block of the values' columns, for all heads that share them
        row, kv_head, dim = unit // blocks // kv_heads, unit // blocks % kv_heads, unit % blocks * BLOCK
        count = min(positions[row] + 1, window)
        group_weights = weights[row, kv_head * groups : (kv_head + 1) * groups]
        values_sum[:] = np.float32(0.0)
        slot = (positions[row] + 1 - count) % slots
        accumulate_ring(values_sum, group_weights, 0, v_cache[row, kv_head], slot, count, dim)
        if begin_publish(team, thread, unit):
            for place in range(groups):
                head = kv_head * groups + place
                for column in range(dim, min(dim + BLOCK, head_dim)):
                    output = rounded(values_sum[place, column] / totals[row, head, 0], qkv)
                    partial[row, 0, head * head_dim + column] = output
            end_publish(team, thread, unit)
        unit = claim(team, thread, units * blocks)

"""The CPU form of decode_attention.

A unit is a row under one key head. Where every thread gets several units, each unit is a chunk; otherwise the units'
keys are split. A row has the same bits in both forms.
"""

import numpy as np
from numba import njit

from runtime.kernels.cpu.arithmetic import capped, exp, narrow, norm, operand, rounded, widen
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.panels import panels_of, products
from runtime.kernels.cpu.sharing import MAX_CHUNKS, THREADS, begin_publish, claim, end_publish, share
from runtime.kernels.cpu.vectors import BLOCK, accumulate_values

KEYS_AT_ONCE = 64
UNITS_PER_THREAD = 2  # or more, and units are not split


# A function that is compiled separately is optimised once more in each of its callers; inlining halves the time that
# this adds.
inlined = njit(inline="always")


@inlined
def blocks_of(head_dim):
    return (head_dim + BLOCK - 1) // BLOCK


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


@inlined
def score(scores, queries, panels, new_keys, k_cache, start, first, end):
    """scores[query, i] = the dot product of a query and the key of position first + i < end, in fp32.

    queries [queries, head_dim] are an operand of the keys, with their panels; k_cache [slots, head_dim] holds the
    positions before `start`, new_keys those from there on.
    """
    slots, key = len(k_cache), first
    while key < end:
        if key < start:
            slot = key % slots
            keys = min(KEYS_AT_ONCE, min(min(start, end) - key, slots - slot))
            products(scores, key - first, keys, k_cache, slot, queries, panels)
        else:
            keys = min(KEYS_AT_ONCE, end - key)
            products(scores, key - first, keys, new_keys, key - start, queries, panels)
        key += keys


@compiled
def attend(
    attended, totals, scores, queries, groups, new_keys, new_values, k_cache, v_cache, start, first, window,
    scale, softcap, like,
):  # fmt: skip
    """Attention under one key head of rows that are successive positions of a sequence, from start + first on: attended
    [queries, head_dim] is the weighted sum of the values, to be divided by totals.

    queries [rows * groups, head_dim] are fp32; k_cache and v_cache [slots, head_dim] hold the positions before `start`,
    new_keys and new_values those from there to the last row's. scores [queries, window + rows] is scratch.
    """
    rows = len(queries) // groups
    oldest = max(0, start + first + 1 - window)
    factors = operand(queries, k_cache)
    score(scores, factors, panels_of(factors, k_cache), new_keys, k_cache, start, oldest, start + first + rows)
    attended[:] = np.float32(0.0)
    for row in range(rows):
        end = start + first + row + 1
        begin = max(0, end - window)
        cached, new = max(0, start - begin), max(begin, start)
        own, out = scores[row * groups : (row + 1) * groups], attended[row * groups : (row + 1) * groups]
        for group in range(groups):
            totals[row * groups + group] = softmax(own[group, begin - oldest : end - oldest], softcap, scale, like)
        for dim in range(0, attended.shape[1], BLOCK):
            accumulate_ring(out, own, begin - oldest, v_cache, begin % len(v_cache), cached, dim)
            accumulate_ring(out, own, new - oldest, new_values, new - start, end - new, dim)


@inlined
def rotated_group(queries, new_key, states, kv_head, kv_heads, cos, sin, q_norm, k_norm, eps):
    """The queries [groups, head_dim] that share a key head, in fp32, and its new key [1, head_dim]: from the heads of a
    row of qkv, [heads + 2 * kv_heads, head_dim]."""
    groups = len(queries)
    for group in range(groups):
        rotated_head(queries[group], states[kv_head * groups + group], q_norm, cos, sin, eps)
    rotated = np.empty(states.shape[1], np.float32)
    rotated_head(rotated, states[groups * kv_heads + kv_head], k_norm, cos, sin, eps)
    for dim in range(len(rotated)):
        new_key[0, dim] = narrow(rotated[dim], new_key)


@inlined
def store_new(k_cache, v_cache, slot, new_key, new_value):
    """Writes a key and a value [1, head_dim] to the caches [slots, head_dim] of their row and key head. No query of the
    step reads that slot: what it held has left the window."""
    for dim in range(k_cache.shape[1]):
        k_cache[slot, dim], v_cache[slot, dim] = new_key[0, dim], new_value[0, dim]


@inlined
def attend_by_units(
    team, thread, out, k_cache, v_cache, states, positions, cos, sin, q_norm, k_norm, window, scale, eps,
    softcap, like,
):  # fmt: skip
    """A chunk is a unit: a row under one key head, with all the queries that share it."""
    rows, (kv_heads, slots, head_dim) = len(states), k_cache.shape[1:]
    heads = states.shape[1] - 2 * kv_heads
    groups = heads // kv_heads
    queries, new_key = np.empty((groups, head_dim), np.float32), np.empty((1, head_dim), k_cache.dtype)
    scores = np.empty((groups, window + 1), np.float32)
    attended, totals = np.empty((groups, head_dim), np.float32), np.empty(groups, np.float32)
    unit = claim(team, thread, rows * kv_heads)
    while unit >= 0:
        row, kv_head, at = unit // kv_heads, unit % kv_heads, positions[unit // kv_heads]
        keys, values, new_value = (
            k_cache[row, kv_head],
            v_cache[row, kv_head],
            states[row, heads + kv_heads + kv_head :],
        )
        rotated_group(queries, new_key, states[row], kv_head, kv_heads, cos[at], sin[at], q_norm, k_norm, eps)
        attend(
            attended, totals, scores, queries, groups, new_key, new_value, keys, values, at, 0, window, scale,
            softcap, like,
        )  # fmt: skip
        if begin_publish(team, thread, unit):
            for group in range(groups):
                head = kv_head * groups + group
                for dim in range(head_dim):
                    out[row, head * head_dim + dim] = narrow(attended[group, dim] / totals[group], out)
            store_new(keys, values, at % slots, new_key, new_value)
            end_publish(team, thread, unit)
        unit = claim(team, thread, rows * kv_heads)


@inlined
def attend_by_splits(
    team, thread, out, scores, weights, totals, k_cache, v_cache, states, positions, cos, sin, q_norm, k_norm, window,
    scale, eps, softcap, like,
):  # fmt: skip
    """A unit's keys are split: a chunk is some of its scores, then a head's softmax, then a block of the values'
    columns for all its heads."""
    rows, (kv_heads, slots, head_dim) = len(states), k_cache.shape[1:]
    heads, units = states.shape[1] - 2 * kv_heads, rows * kv_heads
    groups = heads // kv_heads
    queries, new_key = np.empty((groups, head_dim), np.float32), np.empty((1, head_dim), k_cache.dtype)
    # The number of splits must not depend on the position, which a late thread may read after it has changed.
    splits = max(1, min(4 * team[THREADS], slots // 32, MAX_CHUNKS // units))
    own_scores = np.empty((groups, slots // splits + 1), np.float32)
    rotated_unit = -1
    chunk = claim(team, thread, units * splits)
    while chunk >= 0:
        unit, row, kv_head = chunk // splits, chunk // splits // kv_heads, chunk // splits % kv_heads
        at, count = positions[row], min(positions[row] + 1, window)
        if unit != rotated_unit:
            rotated_group(queries, new_key, states[row], kv_head, kv_heads, cos[at], sin[at], q_norm, k_norm, eps)
            rotated_unit = unit
        keys, oldest = k_cache[row, kv_head], at + 1 - count
        first, end = share(count, chunk % splits, splits)
        factors = operand(queries, keys)
        score(
            own_scores, factors, panels_of(factors, keys), new_key, keys, at, oldest + first, oldest + end
        )  # fmt: skip
        if begin_publish(team, thread, chunk):
            for group in range(groups):
                for key in range(first, end):
                    scores[row, kv_head * groups + group, key] = own_scores[group, key - first]
            if end == count:  # the last split, whatever the count
                new_value = states[row, heads + kv_heads + kv_head :]
                store_new(keys, v_cache[row, kv_head], at % slots, new_key, new_value)
            end_publish(team, thread, chunk)
        chunk = claim(team, thread, units * splits)

    unit = claim(team, thread, rows * heads)
    while unit >= 0:
        row, head = unit // heads, unit % heads
        count = min(positions[row] + 1, window)
        own_weights = scores[row, head, :count].copy()
        total = softmax(own_weights, softcap, scale, like)
        if begin_publish(team, thread, unit):
            totals[row, head] = total
            for key in range(count):
                weights[row, head, key] = own_weights[key]
            end_publish(team, thread, unit)
        unit = claim(team, thread, rows * heads)

    blocks = blocks_of(head_dim)
    values_sum = np.empty((groups, head_dim), np.float32)
    unit = claim(team, thread, units * blocks)
    while unit >= 0:
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
                    out[row, head * head_dim + column] = narrow(values_sum[place, column] / totals[row, head], out)
            end_publish(team, thread, unit)
        unit = claim(team, thread, units * blocks)


@compiled
def decode_attention(
    team, thread, out, scores, weights, totals, k_cache, v_cache, qkv, position, cos, sin, q_norm, k_norm,
    heads, window, scale, eps, softcap,
):  # fmt: skip
    rows, (kv_heads, _, head_dim) = len(qkv), k_cache.shape[1:]
    states = qkv.reshape(rows, heads + 2 * kv_heads, head_dim)
    positions = position.astype(np.int64)  # other threads may start the next step before this one is done
    units = rows * kv_heads
    chunks_of_splits = units * max(heads // kv_heads, blocks_of(head_dim))
    if units >= UNITS_PER_THREAD * team[THREADS] or chunks_of_splits > MAX_CHUNKS:
        attend_by_units(
            team, thread, out, k_cache, v_cache, states, positions, cos, sin, q_norm, k_norm,
            window, scale, eps, softcap, qkv,
        )  # fmt: skip
    else:
        attend_by_splits(
            team, thread, out, scores, weights, totals, k_cache, v_cache, states, positions, cos, sin,
            q_norm, k_norm, window, scale, eps, softcap, qkv,
        )  # fmt: skip

"""Attention of one new token a row, for CPUs."""

from __future__ import annotations

import numpy as np

from runtime.kernels.cpu.arithmetic import capped, exp, narrow, norm, products, rounded, wide
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.sharing import MOST_CHUNKS, THREADS, may_write, share, take, written
from runtime.kernels.cpu.vectors import BLOCK, _mix


@compiled
def turned_head(out, head, norm_weight, cos, sin, eps):
    """A query or key head [head_dim] after its norm (Gemma 3) and rotary embedding, in fp32."""
    for dim in range(len(head)):
        out[dim] = wide(head[dim], head)
    if norm_weight is not None:
        norm(out, out, norm_weight, eps, head)
    half = len(head) // 2
    for dim in range(half):
        low, high = out[dim], out[half + dim]
        c, s = wide(cos[dim], cos), wide(sin[dim], sin)
        out[dim] = rounded(rounded(low * c, head) - rounded(high * s, head), head)
        out[half + dim] = rounded(rounded(high * c, head) + rounded(low * s, head), head)


@compiled
def softmaxed(scores, softcap, scale, like):
    """Turns raw products into weights, in place; without a cap they are left to be divided by the sum returned."""
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
def mixture(out, weights, values, slot, count, dim):
    """out += the sum over i < count, in this order, of weights[:, i] times values[(slot + i) % slots], for the block of
    columns that starts at `dim`.

    out [heads, head_dim] and weights [heads, at least count] are fp32, values [slots, head_dim] of the model's dtype.
    """
    slots, head_dim = values.shape
    start = 0
    while start < count:  # twice where the cache has wrapped around
        length = min(count - start, slots - slot)
        head = 0
        if head_dim - dim >= BLOCK:
            while len(out) - head >= 4:
                _mix(out, weights, start, values, slot, length, dim, head, 4)
                head += 4
            if len(out) - head >= 2:
                _mix(out, weights, start, values, slot, length, dim, head, 2)
                head += 2
            if len(out) > head:
                _mix(out, weights, start, values, slot, length, dim, head, 1)
        else:
            for key in range(length):
                for head in range(len(out)):
                    for column in range(dim, head_dim):
                        out[head, column] += weights[head, start + key] * wide(values[slot + key, column], values)
        start, slot = start + length, 0


@compiled
def decode_attention(
    team,
    thread,
    out,
    scratch,
    k_cache,
    v_cache,
    qkv,
    position,
    cos,
    sin,
    q_norm,
    k_norm,
    heads,
    window,
    scale,
    eps,
    softcap,
):
    kv_heads, slots, head_dim = k_cache.shape[1:]
    rows, groups, units = len(qkv), heads // kv_heads, len(qkv) * kv_heads
    scores, all_weights, totals = scratch[0], scratch[1], scratch[2]
    places = position.copy()  # others may be at a later step before this thread is through
    queries = np.empty((rows, heads, head_dim), np.float32)
    new_keys = np.empty((rows, kv_heads, 1, head_dim), k_cache.dtype)
    turned = np.empty(head_dim, np.float32)
    for row in range(rows):
        at, states = places[row], qkv[row].reshape(heads + 2 * kv_heads, head_dim)
        for head in range(heads):
            turned_head(queries[row, head], states[head], q_norm, cos[at], sin[at], eps)
        for kv_head in range(kv_heads):
            turned_head(turned, states[heads + kv_head], k_norm, cos[at], sin[at], eps)
            for dim in range(head_dim):
                new_keys[row, kv_head, 0, dim] = narrow(turned[dim], k_cache)

    # Over the keys, which all queries of a key head look at together. How many chunks there are may not depend on the
    # position, lest a late thread takes one that there is not.
    stretches = max(1, min(4 * team[THREADS], slots // 32, (MOST_CHUNKS - 1) // units))
    products_of_key, found = np.empty((1, groups), np.float32), np.empty((groups, slots // stretches + 1), np.float32)
    last = units * stretches
    chunk = take(team, thread, last + 1)
    while chunk >= 0:
        unit = min(chunk, last - 1) // stretches
        row, kv_head = unit // kv_heads, unit % kv_heads
        count = min(places[row] + 1, window)
        oldest = places[row] + 1 - count
        first, end = share(count, chunk % stretches, stretches)
        if chunk == last:  # the new key and value go into the cache
            end = first
        group = queries[row, kv_head * groups : (kv_head + 1) * groups]
        for key in range(first, end):
            if key == count - 1:
                products(products_of_key, 1, new_keys[row, kv_head], 0, group)
            else:
                products(products_of_key, 1, k_cache[row, kv_head], (oldest + key) % slots, group)
            for head in range(groups):
                found[head, key - first] = products_of_key[0, head]
        if may_write(team, thread, chunk):
            for head in range(groups):
                for key in range(first, end):
                    scores[row, kv_head * groups + head, key] = found[head, key - first]
            if chunk == last:
                for row in range(rows):
                    states = qkv[row].reshape(heads + 2 * kv_heads, head_dim)
                    for kv_head in range(kv_heads):
                        for dim in range(head_dim):
                            k_cache[row, kv_head, places[row] % slots, dim] = new_keys[row, kv_head, 0, dim]
                            v_cache[row, kv_head, places[row] % slots, dim] = states[heads + kv_heads + kv_head, dim]
            written(team, thread, chunk)
        chunk = take(team, thread, last + 1)

    unit = take(team, thread, rows * heads)
    while unit >= 0:
        row, head = unit // heads, unit % heads
        count = min(places[row] + 1, window)
        weights = scores[row, head, :count].copy()
        total = softmaxed(weights, softcap, scale, qkv)
        if may_write(team, thread, unit):
            totals[row, head, 0] = total
            for key in range(count):
                all_weights[row, head, key] = weights[key]
            written(team, thread, unit)
        unit = take(team, thread, rows * heads)

    blocks = (head_dim + BLOCK - 1) // BLOCK
    mixed = np.empty((groups, head_dim), np.float32)
    unit = take(team, thread, units * blocks)
    while unit >= 0:  # over the values' columns, for all heads that share them
        row, kv_head, dim = unit // blocks // kv_heads, unit // blocks % kv_heads, unit % blocks * BLOCK
        count = min(places[row] + 1, window)
        mixed[:] = np.float32(0.0)
        mixture(
            mixed,
            all_weights[row, kv_head * groups : (kv_head + 1) * groups],
            v_cache[row, kv_head],
            (places[row] + 1 - count) % slots,
            count,
            dim,
        )
        if may_write(team, thread, unit):
            for place in range(groups):
                head = kv_head * groups + place
                for column in range(dim, min(dim + BLOCK, head_dim)):
                    out[row, head * head_dim + column] = narrow(mixed[place, column] / totals[row, head, 0], out)
            written(team, thread, unit)
        unit = take(team, thread, units * blocks)

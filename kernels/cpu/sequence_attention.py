"""The CPU form of sequence_attention: rotary embedding, then attention a few rows at a time, then the cache write.

A row has the bits that decode_attention would give it: the same products, softmax and order of summation over its own
keys. The cache is written last, since a later row's key may take the slot of one that an earlier row still sees.
"""

import numpy as np

from runtime.kernels.cpu.arithmetic import narrow
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.decode_attention import attend, rotated_head, store_new
from runtime.kernels.cpu.sharing import THREADS, begin_publish, claim, end_publish, single, step_rows

MOST_ROWS = 4  # rows whose keys are read together


@compiled
def sequence_attention(
    team, thread, out, queries, new_keys, new_values, k_cache, v_cache, qkv, row, position, cos, sin,
    q_norm, k_norm, heads, window, scale, eps, softcap,
):  # fmt: skip
    kv_heads, slots, head_dim = k_cache.shape[1:]
    out, qkv = step_rows(team, thread, out), step_rows(team, thread, qkv)
    rows, groups = len(qkv), heads // kv_heads
    # A late thread may read the values of a later step: the position is limited, so that indices stay in bounds.
    cache_row, start = row[0], min(np.int64(step_rows(team, thread, position)[0]), len(cos) - rows)

    rotated = np.empty((heads + kv_heads, head_dim), np.float32)
    place = claim(team, thread, rows)
    while place >= 0:
        at, states = start + place, qkv[place].reshape(heads + 2 * kv_heads, head_dim)
        for head in range(heads):
            rotated_head(rotated[head], states[head], q_norm, cos[at], sin[at], eps)
        for head in range(heads, heads + kv_heads):
            rotated_head(rotated[head], states[head], k_norm, cos[at], sin[at], eps)
        if begin_publish(team, thread, place):
            for kv_head in range(kv_heads):
                for group in range(groups):
                    for dim in range(head_dim):
                        queries[kv_head, place, group, dim] = rotated[kv_head * groups + group, dim]
                for dim in range(head_dim):
                    new_keys[kv_head, place, dim] = narrow(rotated[heads + kv_head, dim], new_keys)
                    new_values[kv_head, place, dim] = states[heads + kv_heads + kv_head, dim]
            end_publish(team, thread, place)
        place = claim(team, thread, rows)

    # A chunk is some rows under one key head, with all its queries. The number of rows leaves every thread some chunks.
    size = max(1, min(MOST_ROWS, rows * kv_heads // (2 * team[THREADS])))
    tiles = (rows + size - 1) // size
    scores = np.empty((size * groups, window + size), np.float32)
    attended, totals = np.empty((size * groups, head_dim), np.float32), np.empty(size * groups, np.float32)
    chunk = claim(team, thread, kv_heads * tiles)
    while chunk >= 0:
        kv_head, first = chunk // tiles, chunk % tiles * size
        count = min(size, rows - first)
        tile = queries[kv_head, first : first + count].reshape(count * groups, head_dim)
        attend(
            attended, totals, scores, tile, groups, new_keys[kv_head], new_values[kv_head],
            k_cache[cache_row, kv_head], v_cache[cache_row, kv_head], start, first, window, scale, softcap, qkv,
        )  # fmt: skip
        if begin_publish(team, thread, chunk):
            for place in range(count):
                for group in range(groups):
                    query, head = place * groups + group, kv_head * groups + group
                    for dim in range(head_dim):
                        out[first + place, head * head_dim + dim] = narrow(attended[query, dim] / totals[query], out)
            end_publish(team, thread, chunk)
        chunk = claim(team, thread, kv_heads * tiles)

    while single(team, thread):
        for place in range(max(0, rows - slots), rows):
            for kv_head in range(kv_heads):
                new_key, new_value = new_keys[kv_head, place:], new_values[kv_head, place:]
                store_new(
                    k_cache[cache_row, kv_head],
                    v_cache[cache_row, kv_head],
                    (start + place) % slots,
                    new_key,
                    new_value,
                )
        end_publish(team, thread, 0)

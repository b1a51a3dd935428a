"""The CPU form of lm_head_argmax, which picks a token, and of advance, which ends the step."""

import math

import numpy as np
from numba import njit

from runtime.kernels.cpu.arithmetic import capped, narrow, operand, rounded, widen
from runtime.kernels.cpu.blocks import row_of
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.gumbel import draw, groups_of
from runtime.kernels.cpu.panels import panels_of, products
from runtime.kernels.cpu.projections import add_branch, normed, outputs_per_chunk
from runtime.kernels.cpu.sharing import (
    THREADS,
    begin_publish,
    claim,
    end_publish,
    load_partial,
    single,
    step_rows,
    store_partial,
)


@compiled
def lm_head_argmax(
    team, thread, token, logits, x, norm_weight, table, branch, branch_norm, eps, softcap, seed, position,
    inverse_temperature, mask,
):  # fmt: skip
    x, branch = step_rows(team, thread, x), step_rows(team, thread, branch)
    token, row_logits = step_rows(team, thread, token), step_rows(team, thread, logits)
    row_seed, row_position = step_rows(team, thread, seed), step_rows(team, thread, position)
    row_inverse_temperature = step_rows(team, thread, inverse_temperature)
    row_mask = step_rows(team, thread, mask)
    normed_x = operand(normed(add_branch(x, branch, branch_norm, eps), norm_weight, eps, x), table)
    rows, outputs, panels = len(normed_x), len(table), panels_of(normed_x, table)
    size = outputs_per_chunk(outputs, table.shape[1] * table.itemsize, team[THREADS], rows)
    chunks = (outputs + size - 1) // size
    sums = np.empty((rows, size), np.float32)
    max_logit, max_index = np.empty(rows, np.float32), np.empty(rows, np.int64)
    best = np.full(rows, -np.inf, np.float32)  # of this thread's chunks
    words, logs = np.empty((4, groups_of(size)), np.uint32), np.empty((4, groups_of(size)), np.float32)
    chunk = claim(team, thread, chunks)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)
        products(sums, 0, count, table, first, normed_x, panels)
        for row in range(rows):
            own_logits = sums[row, :count]
            # Rounded before the comparison, as Hugging Face does, so that its ties are ties here.
            for place in range(count):
                own_logits[place] = rounded(own_logits[place], x)
            if softcap is not None:
                for place in range(count):
                    own_logits[place] = capped(own_logits[place], softcap, x)
            max_logit[row], max_index[row] = greatest(own_logits), first
            # The arguments themselves are tested: numba leaves a branch out where one of them is None.
            if seed is not None and row_inverse_temperature[row] > 0:
                max_logit[row], max_index[row] = draw(
                    own_logits, first, max_logit[row], best[row], words, logs, row_seed[row], row_position[row],
                    row_inverse_temperature[row], row_mask, row,
                )  # fmt: skip
            elif not max_logit[row] < best[row]:  # else another chunk's is the token, whatever stands here
                max_index[row] += place_of(own_logits, max_logit[row])
                if mask is not None:
                    max_logit[row], max_index[row] = masked_greatest(
                        own_logits, first, max_logit[row], max_index[row], row_mask[row]
                    )
            best[row] = max(best[row], max_logit[row])
        if begin_publish(team, thread, chunk):
            for row in range(rows):
                store_partial(team, chunk * rows + row, max_logit[row], max_index[row])
                if logits is not None:
                    for place in range(count):
                        row_logits[row, first + place] = narrow(sums[row, place], logits)
            end_publish(team, thread, chunk)
        chunk = claim(team, thread, chunks)
    while single(team, thread):
        for row in range(rows):
            max_logit[row], max_index[row] = load_partial(team, row)
        for chunk in range(1, chunks):
            for row in range(rows):
                logit, index = load_partial(team, chunk * rows + row)
                if logit > max_logit[row] or math.isnan(logit):
                    max_logit[row], max_index[row] = logit, index
        for row in range(rows):
            token[row] = max_index[row] if math.isfinite(max_logit[row]) else -1
        end_publish(team, thread, 0)


MAGNITUDE, INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)  # of fp32: all bits but the sign, and infinity's


@njit(inline="always")
def sort_key(bits):
    """The bits of an fp32 number as an int32 in the order of the numbers; and back. Not for NaN."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & MAGNITUDE))


@compiled
def greatest(values):
    """The greatest of values [n] fp32; a NaN if there is one. As integers, whose maximum LLVM vectorises."""
    key, magnitude = np.int32(-MAGNITUDE), np.int32(0)
    for place in range(len(values)):
        bits = np.int32(np.float32(values[place] + np.float32(0.0)).view(np.int32))  # -0 + 0 = 0
        key = max(key, sort_key(bits))
        magnitude = max(magnitude, np.int32(bits & MAGNITUDE))
    if magnitude > INFINITY:
        return np.float32(np.nan)
    return np.int32(sort_key(key)).view(np.float32)


@compiled
def place_of(values, wanted):
    """The lowest place of a number in values [n]; 0 if it is not there."""
    for place in range(len(values)):
        if values[place] == wanted:
            return place
    return 0


@compiled
def masked_greatest(logits, first, max_logit, max_id, mask):
    """The greatest logit of those ids that may come, and its id, the lowest on ties; minus infinity where none may.

    Args:
        logits: [n] fp32, of the ids `first` to first + n - 1.
        max_logit, max_id: of all these ids, whether they may come or not. A NaN or an infinity is returned as it is.
        mask: [words] int32, a bit for each token (kernels/token_mask.py).
    """
    if not max_logit < np.inf or mask[max_id >> 5] >> (max_id & 31) & 1:
        return max_logit, max_id
    end = first + len(logits)
    best, best_id = np.float32(-np.inf), first
    for at in range(first >> 5, (end + 31) >> 5):
        word = mask[at]
        if word != 0:
            for token in range(max(first, 32 * at), min(end, 32 * at + 32)):
                if word >> (token & 31) & 1 and logits[token - first] > best:
                    best, best_id = logits[token - first], token
    return best, best_id


@compiled
def advance(team, thread, token, x, position, done, emitted, step, table, stop_ids, limit, embed_scale, pad):
    while single(team, thread):
        for row in range(len(token)):
            if done[row]:
                token[row] = pad
            else:
                position[row] += 1
            done[row] |= token[row] < 0 or position[row] >= limit[row]
            for place in range(stop_ids.shape[1]):
                done[row] |= token[row] == stop_ids[row, place]
            emitted[step[0] % len(emitted), row] = token[row]
            embedding = row_of(table, max(token[row], 0))
            for column in range(x.shape[1]):
                x[row, column] = narrow(widen(embedding[column], embedding) * embed_scale, x)
        for row in range(len(step)):
            step[row] += 1
        end_publish(team, thread, 0)

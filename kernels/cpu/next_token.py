"""The CPU form of lm_head_argmax, which picks a token, and of advance, which ends the step."""

import math

import numpy as np

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
    sums = np.empty((size, rows), np.float32)
    max_logit, max_index = np.empty(rows, np.float32), np.empty(rows, np.int64)
    best = np.full(rows, -np.inf, np.float32)  # scores of this thread's chunks
    words, logs = np.empty((4, groups_of(size)), np.uint32), np.empty((4, groups_of(size)), np.float32)
    chunk = claim(team, thread, chunks)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)
        products(sums, count, table, first, normed_x, panels)
        for row in range(rows):
            max_logit[row], max_index[row] = -np.inf, first
            for place in range(count):
                # Rounded before the comparison, as Hugging Face does, so that its ties are ties here.
                logit = rounded(sums[place, row], x)
                if softcap is not None:
                    logit = capped(logit, softcap, x)
                sums[place, row] = logit
                # The lowest index wins a tie, and a NaN is never replaced.
                if logit > max_logit[row] or logit != logit:
                    max_logit[row], max_index[row] = logit, first + place
            # The arguments themselves are tested: numba leaves a branch out where one of them is None.
            if seed is not None and row_inverse_temperature[row] > 0:
                max_logit[row], max_index[row] = draw(
                    sums, row, count, first, max_logit[row], best[row], words, logs, row_seed[row], row_position[row],
                    row_inverse_temperature[row], row_mask,
                )  # fmt: skip
                best[row] = max(best[row], max_logit[row])
            elif mask is not None:
                max_logit[row], max_index[row] = masked_greatest(
                    sums, row, count, first, max_logit[row], max_index[row], best[row], row_mask
                )
                best[row] = max(best[row], max_logit[row])
        if begin_publish(team, thread, chunk):
            for row in range(rows):
                store_partial(team, chunk * rows + row, max_logit[row], max_index[row])
                if logits is not None:
                    for place in range(count):
                        row_logits[row, first + place] = narrow(sums[place, row], logits)
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


@compiled
def masked_greatest(logits, row, count, first, greatest, greatest_id, least, mask):
    """The greatest logit, and its id, of those of the ids `first` to first + count - 1 that may come, the lowest on
    ties; minus infinity where none reaches `least`.

    Args:
        logits: [at least count, rows] fp32, of which column `row` is read.
        greatest, greatest_id: of all these ids, whether they may come or not. A NaN or an infinity is returned as it
            is.
        mask: [rows, words] int32, a bit for each token (kernels/token_mask.py).
    """
    if not greatest < np.inf or mask[row, greatest_id >> 5] >> (greatest_id & 31) & 1:
        return greatest, greatest_id
    best, best_id = np.float32(-np.inf), first
    if greatest < least:
        return best, best_id
    for at in range(first >> 5, (first + count + 31) >> 5):
        word = mask[row, at]
        if word != 0:
            for token in range(max(first, 32 * at), min(first + count, 32 * at + 32)):
                if word >> (token & 31) & 1 and logits[token - first, row] > best:
                    best, best_id = logits[token - first, row], token
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

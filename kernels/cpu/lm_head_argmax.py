"""The output head and its argmax, for CPUs."""

from __future__ import annotations

import math

import numpy as np

from runtime.kernels.cpu.arithmetic import capped, narrow, products, rounded
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.projections import normed, outputs_at_once, residual_stream
from runtime.kernels.cpu.sharing import THREADS, alone, may_write, note, noted, take, written


@compiled
def lm_head_argmax(team, thread, token, x, norm_weight, table, branch, branch_norm, logits, eps, softcap):
    rows_in = normed(residual_stream(x, branch, branch_norm, eps), norm_weight, eps, x)
    rows, outputs = len(rows_in), len(table)
    size = outputs_at_once(outputs, table.shape[1] * table.itemsize, team[THREADS])
    chunks = (outputs + size - 1) // size
    sums = np.empty((size, rows), np.float32)
    best, best_ids = np.empty(rows, np.float32), np.empty(rows, np.int64)
    chunk = take(team, thread, chunks)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)
        products(sums, count, table, first, rows_in)
        for row in range(rows):
            best[row], best_ids[row] = -np.inf, first
            for place in range(count):
                # Rounded before the comparison: ties that Hugging Face sees must be ties here.
                logit = rounded(sums[place, row], x)
                if softcap is not None:
                    logit = capped(logit, softcap, x)
                sums[place, row] = logit
                # The lowest index of equal ones stays, and a NaN, to which nothing compares.
                if logit > best[row] or logit != logit:
                    best[row], best_ids[row] = logit, first + place
        if may_write(team, thread, chunk):
            for row in range(rows):
                note(team, chunk * rows + row, best[row], best_ids[row])
                if logits is not None:
                    for place in range(count):
                        logits[row, first + place] = narrow(sums[place, row], logits)
            written(team, thread, chunk)
        chunk = take(team, thread, chunks)
    while alone(team, thread):
        for row in range(rows):
            best[row], best_ids[row] = noted(team, row)
            for chunk in range(1, chunks):
                logit, index = noted(team, chunk * rows + row)
                if logit > best[row] or math.isnan(logit):
                    best[row], best_ids[row] = logit, index
            token[row] = best_ids[row] if math.isfinite(best[row]) else -1
        written(team, thread, 0)

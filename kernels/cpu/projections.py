"""The projections, each with the norm before it, for CPUs."""

from __future__ import annotations

import numpy as np
from numba import njit

from runtime.kernels.cpu.arithmetic import exp, narrow, norm, products, rounded, wide, widened
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.sharing import CHUNK_BYTES, MOST_CHUNKS, THREADS, may_write, take, written


@compiled
def residual_stream(x, branch, branch_norm, eps):
    """The residual stream [rows, hidden] as fp32, after a branch has joined it, if there is one."""
    stream = widened(x)
    if branch is not None:
        joining = widened(branch)
        for row in range(len(stream)):
            norm(joining[row], joining[row], branch_norm, eps, x)
            for column in range(stream.shape[1]):
                stream[row, column] = rounded(stream[row, column] + joining[row, column], x)
    return stream


@compiled
def normed(stream, norm_weight, eps, like):
    """The norm of each row of a residual stream, [rows, hidden] fp32."""
    out = np.empty_like(stream)
    for row in range(len(stream)):
        norm(out[row], stream[row], norm_weight, eps, like)
    return out


@compiled
def keep(x_out, stream):
    """Stores a residual stream, where there is a place for it."""
    if x_out is not None:
        for row in range(len(stream)):
            for column in range(stream.shape[1]):
                x_out[row, column] = narrow(stream[row, column], x_out)


@njit(inline="always")
def outputs_at_once(outputs, bytes_each, threads):
    """How many outputs of a matrix make a chunk: CHUNK_BYTES of weights, or fewer so that all threads get some."""
    wanted = min(CHUNK_BYTES // bytes_each, outputs // (4 * threads))
    return max(wanted, 8, (outputs + MOST_CHUNKS - 2) // (MOST_CHUNKS - 1))


@compiled
def linear(team, thread, out, x, weight, residual, x_out, stream):
    """out = d(x @ weight^T), or d(residual + that), of fp32 rows x [rows, columns]; x_out keeps `stream`."""
    rows, outputs = len(x), len(weight)
    size = outputs_at_once(outputs, weight.shape[1] * weight.itemsize, team[THREADS])
    last = (outputs + size - 1) // size
    sums = np.empty((size, rows), np.float32)
    chunk = take(team, thread, last + 1)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)  # none in the last chunk, which is the stream
        products(sums, count, weight, first, x)
        if may_write(team, thread, chunk):
            if chunk == last:
                keep(x_out, stream)
            for row in range(rows):
                for place in range(count):
                    if residual is None:
                        out[row, first + place] = narrow(sums[place, row], out)
                    else:
                        before = wide(residual[row, first + place], residual)
                        out[row, first + place] = narrow(before + rounded(sums[place, row], out), out)
            written(team, thread, chunk)
        chunk = take(team, thread, last + 1)


@compiled
def qkv_projection(team, thread, out, x_out, x, norm_weight, weight, branch, branch_norm, eps):
    stream = residual_stream(x, branch, branch_norm, eps)
    linear(team, thread, out, normed(stream, norm_weight, eps, x), weight, None, x_out, stream)


@compiled
def residual_linear(team, thread, out, x, weight, residual):
    linear(team, thread, out, widened(x), weight, residual, None, None)


@compiled
def gated_mlp(team, thread, out, x_out, x, norm_weight, gate_up, branch, branch_norm, eps):
    stream = residual_stream(x, branch, branch_norm, eps)
    rows_in = normed(stream, norm_weight, eps, x)
    rows, outputs = out.shape
    size = outputs_at_once(outputs, 2 * gate_up.shape[1] * gate_up.itemsize, team[THREADS])
    last = (outputs + size - 1) // size
    gates, ups = np.empty((size, rows), np.float32), np.empty((size, rows), np.float32)
    chunk = take(team, thread, last + 1)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)  # none in the last chunk, which is the stream
        for place in range(count):  # in turn, so that both streams of weights flow
            products(gates[place:], 1, gate_up, first + place, rows_in)
            products(ups[place:], 1, gate_up, outputs + first + place, rows_in)
        for row in range(rows):
            for place in range(count):
                gate = rounded(gates[place, row], out)
                bent = np.float32(0.7978845608028654) * (gate + np.float32(0.044715) * gate * gate * gate)
                # gate / 2 * (1 + tanh(bent)), as 1 + tanh(y) = 2 / (1 + e^-2y)
                activated = gate / (np.float32(1.0) + exp(np.float32(-2.0) * bent))
                gates[place, row] = rounded(activated, out) * rounded(ups[place, row], out)
        if may_write(team, thread, chunk):
            if chunk == last:
                keep(x_out, stream)
            for row in range(rows):
                for place in range(count):
                    out[row, first + place] = narrow(gates[place, row], out)
            written(team, thread, chunk)
        chunk = take(team, thread, last + 1)

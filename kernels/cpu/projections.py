"""The CPU form of the projections: qkv_projection, residual_linear and gated_mlp."""

import numpy as np
from numba import njit

from runtime.kernels.cpu.arithmetic import as_fp32, exp, narrow, norm, operand, rounded, widen
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.panels import FEW_ROWS, OUTPUTS, panels_of, products
from runtime.kernels.cpu.sharing import CHUNK_BYTES, MAX_CHUNKS, THREADS, begin_publish, claim, end_publish, step_rows


@compiled
def add_branch(x, branch, branch_norm, eps):
    """The residual [rows, hidden] as fp32: x, plus the norm of the previous branch if there is one."""
    residual = as_fp32(x)
    if branch is not None:
        added = as_fp32(branch)
        for row in range(len(residual)):
            norm(added[row], added[row], branch_norm, eps, x)
            for column in range(residual.shape[1]):
                residual[row, column] = rounded(residual[row, column] + added[row, column], x)
    return residual


@compiled
def normed(residual, norm_weight, eps, like):
    """The norm of each row of a residual, [rows, hidden] fp32."""
    out = np.empty_like(residual)
    for row in range(len(residual)):
        norm(out[row], residual[row], norm_weight, eps, like)
    return out


@compiled
def store_residual(residual_out, residual):
    """Writes a residual to residual_out if that is given."""
    if residual_out is not None:
        for row in range(len(residual)):
            for column in range(residual.shape[1]):
                residual_out[row, column] = narrow(residual[row, column], residual_out)


@njit(inline="always")
def outputs_per_chunk(outputs, bytes_per_output, threads, rows):
    """How many rows of a matrix make a chunk: CHUNK_BYTES of weights, or fewer so that every thread gets some chunks
    and that a chunk takes no longer with many rows of activations; always whole tiles of `products`."""
    wanted = min(CHUNK_BYTES // bytes_per_output, outputs // (4 * threads))
    wanted = wanted * 8 // max(rows, 8)
    size = max(wanted, 8, (outputs + MAX_CHUNKS - 2) // (MAX_CHUNKS - 1))
    return (size + OUTPUTS - 1) // OUTPUTS * OUTPUTS


@compiled
def linear(team, thread, out, column, residual_out, x, weight, residual, new_residual):
    """out from a column on = x @ weight^T, or residual + that, for x [rows, columns], an operand of weight;
    residual_out = new_residual."""
    rows, outputs, panels = len(x), len(weight), panels_of(x, weight)
    size = outputs_per_chunk(outputs, weight.shape[1] * weight.itemsize, team[THREADS], rows)
    last = (outputs + size - 1) // size
    sums = np.empty((rows, size), np.float32)
    chunk = claim(team, thread, last + 1)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)  # nothing in the last chunk, which is residual_out
        products(sums, 0, count, weight, first, x, panels)
        if begin_publish(team, thread, chunk):
            if chunk == last:
                store_residual(residual_out, new_residual)
            for row in range(rows):
                for place in range(count):
                    if residual is None:
                        out[row, column + first + place] = narrow(sums[row, place], out)
                    else:
                        before = widen(residual[row, first + place], residual)
                        out[row, first + place] = narrow(before + rounded(sums[row, place], out), out)
            end_publish(team, thread, chunk)
        chunk = claim(team, thread, last + 1)


@compiled
def qkv_projection(
    team, thread, out, residual_out, x, norm_weight, weight, second_weight, third_weight, branch, branch_norm, eps
):  # fmt: skip
    x, branch = step_rows(team, thread, x), step_rows(team, thread, branch)
    out, residual_out = step_rows(team, thread, out), step_rows(team, thread, residual_out)
    residual = add_branch(x, branch, branch_norm, eps)
    normed_x = operand(normed(residual, norm_weight, eps, x), weight)
    linear(team, thread, out, 0, residual_out, normed_x, weight, None, residual)
    if second_weight is not None:  # matrices in blocks of other formats, the next rows
        linear(team, thread, out, len(weight), None, normed_x, second_weight, None, None)
    if third_weight is not None:
        linear(team, thread, out, len(weight) + len(second_weight), None, normed_x, third_weight, None, None)


@compiled
def residual_linear(team, thread, out, x, weight, residual):
    out, residual = step_rows(team, thread, out), step_rows(team, thread, residual)
    linear(team, thread, out, 0, None, operand(step_rows(team, thread, x), weight), weight, residual, None)


@compiled
def gated_products(gates, ups, like):
    """gates = gelu(gates) * ups, with the roundings of the dtype of `like`, in one loop that LLVM vectorises."""
    for place in range(len(gates)):
        gate = rounded(gates[place], like)
        inner = np.float32(0.7978845608028654) * (gate + np.float32(0.044715) * gate * gate * gate)
        # gate / 2 * (1 + tanh(inner)), as 1 + tanh(y) = 2 / (1 + e^-2y)
        activated = gate / (np.float32(1.0) + exp(np.float32(-2.0) * inner))
        gates[place] = rounded(activated, like) * rounded(ups[place], like)


TILE = 16  # outputs of each matrix at a time


@compiled
def gated_mlp(team, thread, out, residual_out, x, norm_weight, gate_weight, up_weight, branch, branch_norm, eps):
    x, branch = step_rows(team, thread, x), step_rows(team, thread, branch)
    out, residual_out = step_rows(team, thread, out), step_rows(team, thread, residual_out)
    residual = add_branch(x, branch, branch_norm, eps)
    normed_x = operand(normed(residual, norm_weight, eps, x), gate_weight)
    panels = panels_of(normed_x, gate_weight)
    rows, outputs = out.shape
    size = outputs_per_chunk(outputs, 2 * gate_weight.shape[1] * gate_weight.itemsize, team[THREADS], rows)
    last = (outputs + size - 1) // size
    gates, ups = np.empty((rows, size), np.float32), np.empty((rows, size), np.float32)
    chunk = claim(team, thread, last + 1)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)  # nothing in the last chunk, which is residual_out
        if rows > FEW_ROWS:
            products(gates, 0, count, gate_weight, first, normed_x, panels)
            products(ups, 0, count, up_weight, first, normed_x, panels)
        else:
            for place in range(0, count, TILE):  # alternating, so that both matrices are read ahead
                tile = min(TILE, count - place)
                products(gates, place, tile, gate_weight, first + place, normed_x, panels)
                products(ups, place, tile, up_weight, first + place, normed_x, panels)
        if count > 0:
            gated_products(gates.reshape(-1), ups.reshape(-1), out)  # and whatever lies beyond the last outputs
        if begin_publish(team, thread, chunk):
            if chunk == last:
                store_residual(residual_out, residual)
            for row in range(rows):
                for place in range(count):
                    out[row, first + place] = narrow(gates[row, place], out)
            end_publish(team, thread, chunk)
        chunk = claim(team, thread, last + 1)

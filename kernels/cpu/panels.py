"""Dot products of a weight matrix with many rows, whose activations are rearranged so that they are read in order.

With a few rows, time goes into reading the weights; with many, into the multiplications. Here a pass over the columns
keeps in registers one vector of sums for each of OUTPUTS weight rows with each row of a panel. A pass for each vector
of a block makes the sums that arithmetic.dot_products keeps all at once, and they are added in the same order: a row
has the same bits in both forms. If rows were left in place, the cache lines that a pass reads would share a few sets of
the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from runtime.kernels.cpu.arithmetic import dot_products, widen
from runtime.kernels.cpu.block_products import block_products
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.multiply import products_of, vector_columns
from runtime.kernels.cpu.records import format_of
from runtime.kernels.cpu.sharing import share
from runtime.kernels.cpu.vectors import BLOCK, I32, I64, L2, LANES, Arguments, each_float, intrinsic, loop, shuffled

# 18 sums, and what is multiplied into them, fit in the 32 vector registers of AVX-512. So would the 24 of 8 rows, but
# the compiler does not always keep them there: 8 rows take two outputs at a time.
OUTPUTS, PANEL = 3, 6
WIDEST_OUTPUTS, WIDEST_PANEL = 2, 8
FEW_ROWS = 4  # up to which dot_products is used
# Prefetch distance of weights into L2, in outputs. With half of it 8 rows of 640 columns take half as long again.
OUTPUTS_AHEAD = 6


@njit(inline="always")
def panel_count(rows):
    return 1 if rows <= WIDEST_PANEL else (rows + PANEL - 1) // PANEL


def panels_of(x, weight):
    """The whole blocks of x [rows, columns], an operand of the weights, in the order in which `products` reads them:
    panel after panel, of nearly equal numbers of rows; in a panel pass after pass; in a pass block after block, a
    vector of each row in turn. Empty where there are few rows, and for a matrix in blocks of integers."""


@overload(panels_of)
def _panels_of(x, weight):
    if format_of(weight.dtype):
        return lambda x, weight: np.empty((0, 0), x.dtype)
    return lambda x, weight: _panels(x, weight)


@compiled
def _panels(x, weight):
    rows, columns = x.shape
    blocks, width = columns // BLOCK, vector_columns(weight)
    if rows <= FEW_ROWS:
        return np.empty((0, 0), x.dtype)
    out = np.empty((rows, blocks * BLOCK), x.dtype)
    for index in range(panel_count(rows)):
        first, end = share(rows, index, panel_count(rows))
        panel = out[first:end].reshape(BLOCK // width, blocks, end - first, width)
        for row in range(end - first):
            for vector in range(BLOCK // width):
                for block in range(blocks):
                    for lane in range(width):
                        panel[vector, block, row, lane] = x[first + row, block * BLOCK + vector * width + lane]
    return out


def products(sums, count, weight, first, x, panels):
    """sums[i, r] = the dot product of weight[first + i] and x[r], in fp32, for i < count; x [rows, columns] is an
    operand of the weights, and panels are `panels_of` it."""


@overload(products)
def _products(sums, count, weight, first, x, panels):
    if format_of(weight.dtype):
        return lambda sums, count, weight, first, x, panels: block_products(sums, count, weight, first, x)
    return lambda sums, count, weight, first, x, panels: _panel_products(sums, count, weight, first, x, panels)


@compiled
def _panel_products(sums, count, weight, first, x, panels):
    """dot_products(sums, count, weight, first, x), bit for bit."""
    rows, columns = x.shape
    if rows <= FEW_ROWS or count < OUTPUTS:
        dot_products(sums, count, weight, first, x)
        return
    for index in range(panel_count(rows)):
        row, end = share(rows, index, panel_count(rows))
        outputs = WIDEST_OUTPUTS if end - row == WIDEST_PANEL else OUTPUTS
        for start in range(0, count, outputs):
            place = min(start, count - outputs)  # the last outputs may be computed twice
            if end - row == 4:
                dot_panel(sums, place, weight, first + place, panels, row, OUTPUTS, 4)
            elif end - row == 5:
                dot_panel(sums, place, weight, first + place, panels, row, OUTPUTS, 5)
            elif end - row == 6:
                dot_panel(sums, place, weight, first + place, panels, row, OUTPUTS, 6)
            elif end - row == 7:
                dot_panel(sums, place, weight, first + place, panels, row, OUTPUTS, 7)
            else:
                dot_panel(sums, place, weight, first + place, panels, row, WIDEST_OUTPUTS, 8)
    whole = panels.shape[1]
    if whole < columns:
        for place in range(count):
            for column in range(whole, columns):
                value = widen(weight[first + place, column], weight)
                for row in range(rows):
                    sums[place, row] += value * widen(x[row, column], x)


@intrinsic(prefer_literal=True)
def dot_panel(typing_context, out, place, weight, index, panels, first, outputs, rows):
    """out[place + o, first + r] = the dot product of weight[index + o] and row first + r of the panels, over the
    columns of whole blocks, for o < outputs and r < rows: both are literals, and `rows` is the whole panel's number."""

    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out place weight index panels first outputs rows")
        (out, all_rows, _), (panels, whole, _) = args.array("out"), args.array("panels")
        weight, length, weight_type = args.array("weight")
        products = products_of(args, weight_type)
        vectors = BLOCK // products.columns
        outputs = args.literal("outputs")
        rows, first, pass_columns = args.literal("rows"), args.index("first"), builder.sdiv(whole, I64(vectors))
        weight_rows = [
            products.row(weight, builder.add(args.index("index"), I64(output)), length) for output in range(outputs)
        ]
        ahead = builder.mul(length, I64(OUTPUTS_AHEAD * context.get_abi_sizeof(context.get_data_type(weight_type))))
        panel = builder.gep(panels, [builder.mul(first, whole)])
        pairs = [(output, row) for output in range(outputs) for row in range(rows)]

        def one_pass(vector):
            activations = builder.gep(panel, [builder.mul(pass_columns, I64(vector * rows))])

            def one_block(column, sums):
                for weight_row in weight_rows:
                    products.prefetch(weight_row, column, vector, ahead, L2)
                weights = [products.weights(weight_row, column, vector) for weight_row in weight_rows]
                here = builder.mul(builder.sdiv(column, I64(vectors)), I64(rows))
                values = [
                    products.activations(activations, builder.add(here, I64(row * products.columns)))
                    for row in range(rows)
                ]
                return [
                    products.add(total, weights[output], values[row])
                    for (output, row), total in zip(pairs, sums, strict=True)
                ]

            return loop(builder, whole, BLOCK, [each_float(0)] * len(pairs), one_block)

        passes = [one_pass(vector) for vector in range(vectors)]
        while len(passes) > 1:
            passes = [
                [builder.fadd(*both) for both in zip(*two, strict=True)]
                for two in zip(passes[::2], passes[1::2], strict=True)
            ]
        for begin in range(0, len(pairs), LANES):
            totals = _sums_of_lanes(builder, passes[0][begin : begin + LANES])
            for lane, (output, row) in enumerate(pairs[begin : begin + LANES]):
                out_row = builder.mul(builder.add(args.index("place"), I64(output)), all_rows)
                at = builder.add(out_row, builder.add(first, I64(row)))
                builder.store(builder.extract_element(totals, I32(lane)), builder.gep(out, [at]))
        return context.get_dummy_value()

    return types.void(out, place, weight, index, panels, first, outputs, rows), generate


def _sums_of_lanes(builder: Any, vectors: list[Any]) -> Any:
    """The sum of each of up to LANES vectors' lanes, in the first lanes of one vector, each summed as sum_of_lanes
    does: the upper half of the lanes is added to the lower half, for two vectors at a time, until one lane of each is
    left."""
    width = LANES  # lanes that each sum still has
    while width > 1:
        width //= 2
        halved = []
        is_last = len(vectors) == 1
        if len(vectors) % 2:
            vectors = [*vectors, vectors[0]]  # its sums are not used
        for first, second in zip(vectors[::2], vectors[1::2], strict=True):
            count = first.type.count
            sums = range(0, count if is_last else 2 * count, 2 * width)
            lower = [at + lane for at in sums for lane in range(width)]
            upper = [at + width for at in lower]
            halved.append(builder.fadd(*(shuffled(builder, first, second, lanes) for lanes in (lower, upper))))
        vectors = halved
    (total,) = vectors
    return total

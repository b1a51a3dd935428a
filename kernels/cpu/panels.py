"""Dot products of a weight matrix with many rows, whose activations are rearranged so that they are read in order.

With a few rows, time goes into reading the weights; with many, into the multiplications. Here a pass over the columns
keeps in registers one vector of sums for each of OUTPUTS weight rows with each row of a panel. A pass for each vector
of a block, or for each half of one, makes the sums that arithmetic.dot_products keeps all at once, and they are added
in the same order: a row has the same bits in both forms. If rows were left in place, the cache lines that a pass reads
would share a few sets of the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from runtime.kernels.cpu.arithmetic import add_rest, dot_products
from runtime.kernels.cpu.block_products import block_products
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.multiply import products_of, vector_columns
from runtime.kernels.cpu.records import format_of
from runtime.kernels.cpu.sharing import share
from runtime.kernels.cpu.vectors import (
    BLOCK,
    CACHE_LINE,
    I32,
    I64,
    L1,
    L2,
    LANES,
    Arguments,
    each_float,
    intrinsic,
    loop,
    processor_features,
    shuffled,
)

if "+avx512f" in processor_features():
    # 18 sums, and what is multiplied into them, fit in 32 vector registers. So would the 24 of 8 rows, but the compiler
    # does not always keep them there: 8 rows take two outputs at a time.
    PASS_LANES, OUTPUTS, PANEL, WIDEST_OUTPUTS, WIDEST_PANEL = LANES, 3, 6, 2, 8
    FEW_ROWS, PANELS_TOGETHER = 4, 1
else:
    # 12 sums of half as many lanes fit in 16 registers. Two panels are multiplied by the same outputs before the next
    # ones, so that reading the weights overlaps with the multiplications of both.
    PASS_LANES, OUTPUTS, PANEL, WIDEST_OUTPUTS, WIDEST_PANEL = LANES // 2, 2, 6, 2, 6
    FEW_ROWS, PANELS_TOGETHER = 3, 2
# Up to FEW_ROWS dot_products is used. PIECES of PASS_LANES make a vector of it.
PIECES = LANES // PASS_LANES
# Prefetch distance of weights into L2 where a pass reads whole vectors, in outputs. With half of it 8 rows of 640
# columns take half as long again (with AVX-512).
OUTPUTS_AHEAD = 6
# Least prefetch distances in bytes where it reads pieces, into L2 and from there into L1. Without the latter a step of
# four rows of the demo in bf16 takes 26 ms, not 21; with a first one that is less than what OUTPUTS are, rows of 16,384
# columns take a sixth longer (Zen 3).
FAR_AHEAD, NEAR_AHEAD = 12288, 2048


@njit(inline="always")
def panel_count(rows):
    return 1 if rows <= WIDEST_PANEL else (rows + PANEL - 1) // PANEL


@njit(inline="always")
def outputs_with(rows):
    """How many outputs are multiplied by a panel of so many rows at a time."""
    return WIDEST_OUTPUTS if rows == WIDEST_PANEL else OUTPUTS


def _sizes(rows: int) -> set[int]:
    """How many rows the panels of so many rows have."""
    shares = (share.py_func(rows, index, panel_count.py_func(rows)) for index in range(panel_count.py_func(rows)))
    return {end - first for first, end in shares}


PANEL_SIZES = sorted(set().union(*(_sizes(rows) for rows in range(FEW_ROWS + 1, 65))))  # more rows have no others


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
    pass_width = width // PIECES
    if rows <= FEW_ROWS:
        return np.empty((0, 0), x.dtype)
    out = np.empty((rows, blocks * BLOCK), x.dtype)
    for index in range(panel_count(rows)):
        first, end = share(rows, index, panel_count(rows))
        panel = out[first:end].reshape(BLOCK // pass_width, blocks, end - first, pass_width)
        for row in range(end - first):
            for number in range(BLOCK // pass_width):
                for block in range(blocks):
                    # A piece of a vector that `operand` has rearranged lies in two places, LANES apart.
                    start = block * BLOCK + number // PIECES * width + number % PIECES * PASS_LANES
                    for part in range(pass_width // PASS_LANES):
                        for lane in range(PASS_LANES):
                            column = start + part * LANES + lane
                            panel[number, block, row, part * PASS_LANES + lane] = x[first + row, column]
    return out


def products(sums, at, count, weight, first, x, panels):
    """sums[r, at + i] = the dot product of weight[first + i] and x[r], in fp32, for i < count; x [rows, columns] is an
    operand of the weights, and panels are `panels_of` it."""


@overload(products)
def _products(sums, at, count, weight, first, x, panels):
    if format_of(weight.dtype):
        return lambda sums, at, count, weight, first, x, panels: block_products(sums, at, count, weight, first, x)
    return lambda sums, at, count, weight, first, x, panels: _panel_products(sums, at, count, weight, first, x, panels)


@compiled
def _panel_products(sums, at, count, weight, first, x, panels):
    """dot_products(sums, at, count, weight, first, x), bit for bit."""
    rows = len(x)
    if rows <= FEW_ROWS or count < OUTPUTS:
        dot_products(sums, at, count, weight, first, x)
        return
    number = panel_count(rows)
    for begin in range(0, number, PANELS_TOGETHER):
        row, end = share(rows, begin, number)
        outputs = outputs_with(end - row)
        for start in range(0, count, outputs):
            place = min(start, count - outputs)  # the last outputs may be computed twice
            for panel in range(begin, min(begin + PANELS_TOGETHER, number)):
                row, end = share(rows, panel, number)
                dot_panel(sums, at + place, weight, first + place, panels, row, end - row)
    add_rest(sums, at, count, weight, first, x, panels.shape[1])


@intrinsic
def dot_panel(typing_context, out, place, weight, index, panels, first, rows):
    """out[first + r, place + o] = the dot product of weight[index + o] and row first + r of the panels, over the
    columns of whole blocks, for r < rows, the whole panel's number, and o < outputs_with(rows)."""

    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out place weight index panels first rows")
        for size in PANEL_SIZES:
            with builder.if_then(builder.icmp_signed("==", args.index("rows"), I64(size))):
                _dot_panel(args, size)
        return context.get_dummy_value()

    return types.void(out, place, weight, index, panels, first, rows), generate


def _dot_panel(args: Arguments, rows: int) -> None:
    """dot_panel for a number of rows."""
    builder, outputs = args.builder, outputs_with.py_func(rows)
    (out, out_length, _), (panels, whole, _) = args.array("out"), args.array("panels")
    weight, length, weight_type = args.array("weight")
    products = products_of(args, weight_type, PASS_LANES)
    numbers, first = BLOCK // products.columns, args.index("first")
    pass_columns, blocks = builder.sdiv(whole, I64(numbers)), builder.sdiv(whole, I64(BLOCK))
    weight_rows = [
        products.row(weight, builder.add(args.index("index"), I64(output)), length) for output in range(outputs)
    ]
    row_bytes = builder.mul(length, I64(weight_type.bitwidth // 8))
    ahead = builder.mul(row_bytes, I64(OUTPUTS_AHEAD))
    tile = builder.mul(row_bytes, I64(outputs))
    far = builder.select(builder.icmp_signed(">", tile, I64(FAR_AHEAD)), tile, I64(FAR_AHEAD))
    panel = builder.gep(panels, [builder.mul(first, whole)])

    def prefetch(column: Any, number: int) -> None:
        if PIECES == 1:
            for weight_row in weight_rows:
                products.prefetch(weight_row, column, number, ahead, L2)
        elif number % PIECES == 0:  # a line for each block that the pass reads, in the order of addresses
            block = builder.add(builder.sdiv(column, I64(BLOCK)), builder.mul(blocks, I64(number // PIECES)))
            for output in range(outputs):
                line = builder.mul(builder.add(builder.mul(block, I64(outputs)), I64(output)), I64(CACHE_LINE))
                args.prefetch(weight_rows[0], builder.add(line, far), L2)
                args.prefetch(weight_rows[0], builder.add(line, I64(NEAR_AHEAD)), L1)

    def one_pass(number: int) -> list[Any]:
        activations = builder.gep(panel, [builder.mul(pass_columns, I64(number * rows))])

        def one_block(column: Any, sums: list[Any]) -> list[Any]:
            prefetch(column, number)
            here, sums = builder.mul(builder.sdiv(column, I64(numbers)), I64(rows)), list(sums)
            for part in range(products.parts):
                weights = [products.weights(weight_row, column, number, part) for weight_row in weight_rows]
                for row in range(rows):  # whose values are loaded just before their use: few registers are left
                    values = products.activations(activations, builder.add(here, I64(row * products.columns)), part)
                    for output in range(outputs):
                        at = output * rows + row
                        sums[at] = products.add(sums[at], weights[output], values)
            return sums

        return loop(builder, whole, BLOCK, [each_float(0, products.sums)] * (outputs * rows), one_block)

    passes = [one_pass(number) for number in range(numbers)]
    totals = [_added(builder, passes[piece::PIECES]) for piece in range(PIECES)]
    while len(totals) > 1:  # the upper half of the lanes to the lower half
        half = len(totals) // 2
        totals = [_added(builder, [totals[piece], totals[half + piece]]) for piece in range(half)]
    for begin in range(0, outputs * rows, PASS_LANES):
        sums = _sums_of_lanes(builder, totals[0][begin : begin + PASS_LANES])
        for lane in range(min(PASS_LANES, outputs * rows - begin)):
            output, row = divmod(begin + lane, rows)
            out_row = builder.mul(builder.add(first, I64(row)), out_length)
            at = builder.add(out_row, builder.add(args.index("place"), I64(output)))
            builder.store(builder.extract_element(sums, I32(lane)), builder.gep(out, [at]))


def _added(builder: Any, passes: list[list[Any]]) -> list[Any]:
    """The sums of several passes, added pairwise."""
    while len(passes) > 1:
        passes = [
            [builder.fadd(*both) for both in zip(*two, strict=True)]
            for two in zip(passes[::2], passes[1::2], strict=True)
        ]
    return passes[0]


def _sums_of_lanes(builder: Any, vectors: list[Any]) -> Any:
    """The sum of the lanes of each of some vectors, of which there are no more than a vector has lanes, in the first
    lanes of one vector. Each is summed as sum_of_lanes does: the upper half of the lanes is added to the lower half,
    for two vectors at a time, until one lane of each is left."""
    width = vectors[0].type.count  # lanes that each sum still has
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

"""Dot products of a matrix in blocks with activations in fixed point (fixed_point.py).

For each lane of a unit, which has the columns of half a block of 32 (block_formats.py) or, at the end of a row, fewer,

    total = fma(sum((q - zero) * n) * step, scale, total)
    total = fma(sum(n) * step, minimum, total)               in formats with minimums

in fp32, where both sums are integers: exact, in two parts of at most 28 bits, sum = high * 2^16 + low, and rounded in
fma(high, 2^16, low). The lanes are added at the end. So the order, and so the bits, are the same for any number of
rows, outputs and threads, and on every processor. A tile has two outputs, which share what is loaded of the
activations, and a few rows, which share what is unpacked of the weights.
"""

from __future__ import annotations

from typing import Any

from numba import types

from runtime.kernels.cpu.blocks import BYTES, Blocks, Weights, each, each_float, format_of, readers
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.fixed_point import add_byte_products, unit_vectors
from runtime.kernels.cpu.vectors import (
    CACHE_LINE,
    I64,
    INTS,
    L1,
    L2,
    LANES,
    VECTOR,
    Arguments,
    intrinsic,
    loop,
    sum_of_lanes,
)

OUTPUTS, ROWS = 2, 4  # of a tile
# Of activations that stay in cache while outputs pass: without, 32 rows of 16,384 columns take 1.6 times as long.
PANEL_BYTES = 24 << 10
# Prefetch distances in bytes, into L2 and from there into L1. The former was chosen for tiles of four outputs, whose
# rows are read at once: with that of other matrices (4096 + 128) a head of Q8_0 took nearly twice as long. With two
# outputs no difference has been seen.
FAR_AHEAD, NEAR_AHEAD = 8192 + 128, 512


@compiled
def block_products(sums, count, weight, first, x):
    """sums[i, r] = the dot product of weight[first + i] and row r of activations, for i < count.

    sums [at least count, rows] is fp32, weight an array of records, x what `fixed_point` makes of the activations.
    """
    rows = len(x)
    if count < OUTPUTS:
        for output in range(count):
            for row in range(rows):
                block_tile(sums, output, weight, first + output, x, row, 1, 1)
        return
    panel = max(ROWS, PANEL_BYTES // (4 * x.shape[1]) // ROWS * ROWS)
    for begin in range(0, rows, panel):
        end = min(begin + panel, rows)
        for start in range(0, count, OUTPUTS):
            place, row = min(start, count - OUTPUTS), begin  # the last outputs may be computed twice
            while end - row >= ROWS:
                block_tile(sums, place, weight, first + place, x, row, OUTPUTS, ROWS)
                row += ROWS
            if end - row >= 2:
                block_tile(sums, place, weight, first + place, x, row, OUTPUTS, 2)
                row += 2
            if end > row:
                block_tile(sums, place, weight, first + place, x, row, OUTPUTS, 1)


@intrinsic(prefer_literal=True)
def block_tile(typing_context, out, place, weight, index, x, first, outputs, rows):
    """out[place + o, first + r] = the dot product of weight[index + o] and row first + r of x, for o < outputs and
    r < rows, both literals."""

    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out place weight index x first outputs rows")
        (out, all_rows, _), (weight, blocks, dtype), (x, words, _) = (
            args.array(name) for name in ("out", "weight", "x")
        )
        form = format_of(dtype)
        assert form is not None, "an array of records"
        outputs, rows = args.literal("outputs"), args.literal("rows")
        x_rows = [
            builder.gep(x, [builder.mul(builder.add(args.index("first"), I64(row)), words)]) for row in range(rows)
        ]
        sums = [each_float(0)] * (outputs * rows)
        for reader in readers(args, form):
            weight_rows = [
                reader.row(weight, builder.add(args.index("index"), I64(output)), blocks) for output in range(outputs)
            ]
            size, count = I64(unit_vectors(reader.groups) * LANES), reader.units(blocks)

            def one_unit(index, sums, reader=reader, weight_rows=weight_rows, size=size, x_rows=x_rows):
                for row in weight_rows:
                    address = reader.address(row, index)
                    for line in range(0, reader.bytes, CACHE_LINE):
                        args.prefetch(address, I64(FAR_AHEAD + line), L2)
                        args.prefetch(address, I64(NEAR_AHEAD + line), L1)
                units = [reader.weights(row, index) for row in weight_rows]
                at = builder.mul(index, size)
                updated = [
                    _added(args, reader, units, builder.gep(row, [at]), sums[n::rows]) for n, row in enumerate(x_rows)
                ]
                return [updated[row][output] for output in range(outputs) for row in range(rows)]

            sums = loop(builder, count, 1, sums, one_unit)
            x_rows = [builder.gep(row, [builder.mul(count, size)]) for row in x_rows]
        for output in range(outputs):
            for row in range(rows):
                out_row = builder.mul(builder.add(args.index("place"), I64(output)), all_rows)
                at = builder.add(out_row, builder.add(args.index("first"), I64(row)))
                builder.store(sum_of_lanes(builder, sums[output * rows + row]), builder.gep(out, [at]))
        return context.get_dummy_value()

    return types.void(out, place, weight, index, x, first, outputs, rows), generate


def _added(args: Arguments, reader: Blocks, units: list[Weights], x: Any, sums: list[Any]) -> list[Any]:
    """The sums of one row of activations and a unit of each output, given the address of the row's unit."""
    builder, groups = args.builder, reader.groups

    def load(vector: int, kind: Any) -> Any:
        at = builder.gep(x, [I64(vector * LANES)])
        return builder.load(builder.bitcast(at, kind.as_pointer()), align=CACHE_LINE)

    minus_sums = [load(3 * groups + part, INTS) for part in range(2)]
    high, low = each(0), each(0)
    if reader.zero_bits is not None:
        high, low = (builder.shl(part, each(reader.zero_bits)) for part in minus_sums)
    totals = [[high, each(0), low] for _ in units]  # of each digit
    for number in range(3):
        for group in range(groups):
            digit = load(number * groups + group, BYTES)
            for total, unit in zip(totals, units, strict=True):
                total[number] = add_byte_products(args, total[number], unit.q[group], digit, reader.bits)
    step = load(3 * groups + 2, VECTOR)
    if reader.zero_bits is None:
        total_of_x = builder.fmul(_joined(args, *(builder.neg(part) for part in minus_sums)), step)
    updated = []
    for (high, middle, low), unit, before in zip(totals, units, sums, strict=True):
        n = _joined(args, high, builder.add(builder.shl(middle, each(8)), low))
        after = builder.call(args.fma, [builder.fmul(n, step), unit.scale, before])
        if unit.minimum is not None:
            after = builder.call(args.fma, [total_of_x, unit.minimum, after])
        updated.append(after)
    return updated


def _joined(args: Arguments, high: Any, low: Any) -> Any:
    """high * 2^16 + low, as fp32."""
    builder = args.builder
    return builder.call(args.fma, [builder.sitofp(high, VECTOR), each_float(65536), builder.sitofp(low, VECTOR)])

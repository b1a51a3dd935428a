"""Dot products of a matrix in blocks with activations in fixed point (fixed_point.py).

For each lane of a unit, which has the columns of half a block of 32 (block_formats.py) or, at the end of a row, fewer,

    total = fma(sum((q - zero) * n) * step, scale, total)
    total = fma(sum(n) * step, minimum, total)               in formats with minimums

in fp32, where both sums are integers: exact, in two parts, sum = high * 2^16 + low, and rounded once, in fma(high,
2^16, low). The lanes are added at the end. So the order of summation, and with it the bits, is the same for any number
of rows, outputs and threads, and on every processor. A tile has a few rows, which share the unpacked weights, and where
there are enough registers two outputs, which share the loaded activations.
"""

from __future__ import annotations

from typing import Any

from numba import types

from runtime.kernels.cpu.blocks import Blocks, Weights, readers
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.digits import Sums, digits_for, multiplies_bytes, sums_of_products
from runtime.kernels.cpu.fixed_point import digits_at, sums_at, unit_vectors
from runtime.kernels.cpu.records import format_of
from runtime.kernels.cpu.vectors import (
    CACHE_LINE,
    I64,
    INTS,
    L1,
    L2,
    LANES,
    VECTOR,
    Arguments,
    each,
    each_float,
    intrinsic,
    loop,
    sum_of_lanes,
)

# The size of a tile. Two outputs and four rows fill the 32 registers of a processor that multiplies bytes. Sixteen hold
# one output and two rows: with more, LLVM spills what they share, which takes 1.3 to 1.6 times as long (Zen 3).
OUTPUTS, ROWS = (2, 4) if multiplies_bytes() else (1, 2)
# Of activations, which stay in cache for all outputs: without this limit, 32 rows of 16,384 columns take 1.6 times as
# long.
PANEL_BYTES = 24 << 10
# Prefetch distances in bytes, into L2 and from there into L1. The former was chosen for tiles of four outputs, whose
# rows are read at once: with the distance of other matrices (4096 + 128) a head of Q8_0 took nearly twice as long. With
# two outputs no difference has been seen.
FAR_AHEAD, NEAR_AHEAD = 8192 + 128, 512


@compiled
def block_products(sums, at, count, weight, first, x):
    """sums[r, at + i] = the dot product of weight[first + i] and row r of activations, for i < count.

    sums [rows, at least at + count] is fp32, weight an array of records, x what `fixed_point` makes of the activations.
    """
    rows = len(x)
    if count < OUTPUTS:
        for output in range(count):
            for row in range(rows):
                block_tile(sums, at + output, weight, first + output, x, row, 1, 1)
        return
    panel = max(ROWS, PANEL_BYTES // (4 * x.shape[1]) // ROWS * ROWS)
    for begin in range(0, rows, panel):
        end = min(begin + panel, rows)
        for start in range(0, count, OUTPUTS):
            place, row = min(start, count - OUTPUTS), begin  # the last outputs may be computed twice
            while end - row >= ROWS:
                block_tile(sums, at + place, weight, first + place, x, row, OUTPUTS, ROWS)
                row += ROWS
            if end - row >= 2:
                block_tile(sums, at + place, weight, first + place, x, row, OUTPUTS, 2)
                row += 2
            if end > row:
                block_tile(sums, at + place, weight, first + place, x, row, OUTPUTS, 1)


@intrinsic(prefer_literal=True)
def block_tile(typing_context, out, place, weight, index, x, first, outputs, rows):
    """out[first + r, place + o] = the dot product of weight[index + o] and row first + r of x, for o < outputs and
    r < rows, both literals."""

    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out place weight index x first outputs rows")
        (out, out_length, _), (weight, blocks, dtype), (x, words, _) = (
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
                return _added(args, reader, units, [builder.gep(row, [at]) for row in x_rows], sums)

            sums = loop(builder, count, 1, sums, one_unit)
            x_rows = [builder.gep(row, [builder.mul(count, size)]) for row in x_rows]
        for output in range(outputs):
            for row in range(rows):
                out_row = builder.mul(builder.add(args.index("first"), I64(row)), out_length)
                at = builder.add(out_row, builder.add(args.index("place"), I64(output)))
                builder.store(sum_of_lanes(builder, sums[output * rows + row]), builder.gep(out, [at]))
        return context.get_dummy_value()

    return types.void(out, place, weight, index, x, first, outputs, rows), generate


def _added(args: Arguments, reader: Blocks, units: list[Weights], x: list[Any], sums: list[Any]) -> list[Any]:
    """The sums [outputs * rows] plus the products of a unit of each output with that of each row, whose addresses are
    `x`."""
    builder, kind, groups = args.builder, digits_for(reader.bits), reader.groups
    sums_of_x, step_at = sums_at(kind, groups), unit_vectors(groups) - 1

    def at(row: Any, vector: int) -> Any:
        return builder.gep(row, [I64(vector * LANES)])

    def load(row: Any, vector: int, kind: Any) -> Any:
        return builder.load(builder.bitcast(at(row, vector), kind.as_pointer()), align=CACHE_LINE)

    def start(row: Any) -> Sums:
        if reader.zero_bits is None:
            return each(0), each(0)
        high, low = (load(row, sums_of_x + part, INTS) for part in range(2))
        return builder.shl(high, each(reader.zero_bits)), builder.shl(low, each(reader.zero_bits))

    updated = list(sums)
    digits = [at(row, digits_at(kind, groups)) for row in x]
    totals = sums_of_products(args, kind, [unit.q for unit in units], reader.bits, digits, map(start, x))
    for number, (row, total) in enumerate(zip(x, totals, strict=True)):
        step = load(row, step_at, VECTOR)
        if reader.zero_bits is None:
            high, low = (builder.neg(load(row, sums_of_x + part, INTS)) for part in range(2))
            total_of_x = builder.fmul(_joined(args, high, low, 1), step)
        for place, (unit, (high, low)) in enumerate(zip(units, total, strict=True)):
            sum_at = place * len(x) + number
            n = builder.fmul(_joined(args, high, low, reader.bits), step)
            updated[sum_at] = builder.call(args.fma, [n, unit.scale, updated[sum_at]])
            if unit.minimum is not None:
                updated[sum_at] = builder.call(args.fma, [total_of_x, unit.minimum, updated[sum_at]])
    return updated


def _joined(args: Arguments, high: Any, low: Any, bits: int) -> Any:
    """high * 2^16 + low as fp32, the sum of a lane's products with numbers of so many bits; rounded once."""
    builder = args.builder
    if bits > 5:  # `low` may have more than 24 bits
        high, low = builder.add(high, builder.ashr(low, each(16))), builder.and_(low, each(0xFFFF))
    return builder.call(args.fma, [builder.sitofp(high, VECTOR), each_float(65536), builder.sitofp(low, VECTOR)])

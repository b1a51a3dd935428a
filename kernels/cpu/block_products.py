"""Dot products of a matrix in blocks with activations in fixed point (fixed_point.py).

For each lane of a group of 64 columns, which has four of them,

    total = fma(sum((q - zero) * n) * step, scale, total)
    total = fma(sum(n) * step, minimum, total)               in formats with minimums

in fp32, where both sums are integers: exact, and rounded to fp32 once (for Q8_0 in two parts, since it may have 33
bits), and the lanes are added at the end: the order, and so the bits, are the same for any number of rows, outputs
and threads, and on every processor. A tile has a few outputs, which share what is loaded of the activations, and a few
rows, which share what is unpacked of the weights.
"""

from __future__ import annotations

from typing import Any

from numba import types

from runtime.kernels.cpu.blocks import BYTES, Blocks, each, each_float, format_of
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.fixed_point import (
    DIGIT_0,
    DIGIT_1,
    DIGIT_2,
    GROUP_WORDS,
    MINUS_SUM,
    STEP,
    add_byte_products,
)
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

OUTPUTS = 4  # of a tile
# Prefetch distances in bytes, into L2 and from there into L1: rows are short and a tile reads several at once, so the
# former has to be twice that of other matrices. With that (4096 + 128) a head of Q8_0 takes nearly twice as long.
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
    for start in range(0, count, OUTPUTS):
        place, row = min(start, count - OUTPUTS), 0  # the last outputs may be computed twice
        while rows - row >= 4:
            block_tile(sums, place, weight, first + place, x, row, OUTPUTS, 4)
            row += 4
        if rows - row >= 2:
            block_tile(sums, place, weight, first + place, x, row, OUTPUTS, 2)
            row += 2
        if rows > row:
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
        reader, outputs, rows = Blocks(args, form), args.literal("outputs"), args.literal("rows")
        weight_rows = [
            reader.row(weight, builder.add(args.index("index"), I64(output)), blocks) for output in range(outputs)
        ]
        x_rows = [
            builder.gep(x, [builder.mul(builder.add(args.index("first"), I64(row)), words)]) for row in range(rows)
        ]

        def load(group, vector, kind):
            at = builder.gep(group, [I64(vector * LANES)])
            return builder.load(builder.bitcast(at, kind.as_pointer()), align=CACHE_LINE)

        def one_unit(index, sums):
            sums = list(sums)
            units = [reader.unit(row, index) for row in weight_rows]
            for unit in units:
                for line in range(0, reader.bytes, CACHE_LINE):
                    args.prefetch(unit.address, I64(FAR_AHEAD + line), L2)
                    args.prefetch(unit.address, I64(NEAR_AHEAD + line), L1)
            for number in range(reader.groups):
                weights = [reader.group(unit, number) for unit in units]
                at = builder.mul(builder.add(builder.mul(index, I64(reader.groups)), I64(number)), I64(GROUP_WORDS))
                for row, x_row in enumerate(x_rows):
                    group = builder.gep(x_row, [at])
                    digits = [load(group, digit, BYTES) for digit in (DIGIT_2, DIGIT_1, DIGIT_0)]
                    minus_sum, step = load(group, MINUS_SUM, INTS), load(group, STEP, VECTOR)
                    for output, (q, scale, minimum) in enumerate(weights):
                        n = _lane_sums(args, reader, q, digits, minus_sum)
                        place = output * rows + row
                        sums[place] = builder.call(args.fma, [builder.fmul(n, step), scale, sums[place]])
                        if minimum is not None:
                            total = builder.sitofp(builder.neg(minus_sum), VECTOR)
                            sums[place] = builder.call(args.fma, [builder.fmul(total, step), minimum, sums[place]])
            return sums

        sums = loop(builder, reader.units(blocks), 1, [each_float(0)] * (outputs * rows), one_unit)
        for output in range(outputs):
            for row in range(rows):
                out_row = builder.mul(builder.add(args.index("place"), I64(output)), all_rows)
                at = builder.add(out_row, builder.add(args.index("first"), I64(row)))
                builder.store(sum_of_lanes(builder, sums[output * rows + row]), builder.gep(out, [at]))
        return context.get_dummy_value()

    return types.void(out, place, weight, index, x, first, outputs, rows), generate


def _lane_sums(args: Arguments, reader: Blocks, q: Any, digits: list[Any], minus_sum: Any) -> Any:
    """sum((q - zero) * n) of each lane, as fp32."""
    builder, byte, bits, zero_bits = args.builder, each(8), reader.bits, reader.zero_bits
    if bits < 8:  # all of it has 32 bits
        n = each(0)
        for digit in digits:
            n = add_byte_products(args, builder.shl(n, byte), q, digit, bits)
        if zero_bits is not None:
            n = builder.add(n, builder.shl(minus_sum, each(zero_bits)))
        return builder.sitofp(n, VECTOR)
    assert zero_bits is not None, "all formats of 8 bits are signed"
    # zero * minus_sum in two parts too, the lower one of 16 bits
    below = builder.and_(builder.shl(minus_sum, each(zero_bits)), each(0xFFFF))
    befores = builder.ashr(minus_sum, each(16 - zero_bits)), each(0), below
    high, middle, low = (
        add_byte_products(args, before, q, digit, bits) for before, digit in zip(befores, digits, strict=True)
    )
    low = builder.add(builder.shl(middle, byte), low)
    return builder.call(args.fma, [builder.sitofp(high, VECTOR), each_float(65536), builder.sitofp(low, VECTOR)])

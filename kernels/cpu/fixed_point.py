"""Activations as products with matrices in blocks take them: 24-bit fixed-point numbers, in three digits of 8 bits.

For the columns of a lane, which are 16 neighbours or, at the end of a row, 8 or 4 (block_formats.py), the power of two
`step` is the least for which |n| <= 8355711 = 127 * (2^16 + 2^8 + 1) in

    n = round(x / step) = d2 * 2^16 + d1 * 2^8 + d0          -128 <= d <= 127

So |n| is nearly 2^22 or more where |x| is greatest, and x - n * step is at most step / 2, or 2^-23 of the greatest |x|:
less than what sums of fp32 products round on the way to the columns' total. (Below 2^-96 the error is absolute, at most
2^-120.) An outlier takes precision from its neighbours alone. Sums of products with integers are integers, exact in any
order, and processors have instructions for them: 64 products and 64 additions at once.

A unit of G groups of 64 columns has 3 G + 3 vectors, with a lane's columns in the order of a unit of weights:

    d2, d1, d0              of each group, 64 bytes each
    -sum(d2)                of each lane, int32: what unsigned weights have too much,
    -sum(2^8 * d1 + d0)     and the rest of that
    step                    of each lane, fp32
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from runtime.kernels.cpu.block_formats import COLUMNS, UNITS
from runtime.kernels.cpu.blocks import BYTES, each, lane_of, shuffled
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.vectors import (
    CACHE_LINE,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    VECTOR,
    Arguments,
    intrinsic,
    loop,
    processor_features,
)

PER_LANE = 4  # columns of a group
_LOWEST_EXPONENT = 30  # biased: step and 1 / step are normal numbers
_ROUNDS_UP = (1 << 24) - 2 * 8355711 + 1  # to a power of two, by how much a significand would be too large


def unit_vectors(groups: int) -> int:
    """How many vectors a unit of so many groups has."""
    return 3 * groups + 3


_UNIT_WORDS = tuple(LANES * unit_vectors(groups) for groups in UNITS)


def add_byte_products(args: Arguments, total: Any, unsigned: Any, signed: Any, bits: int) -> Any:
    """total + the sum of a lane's four products, exactly.

    Args:
        args: of the intrinsic that adds.
        total: [LANES] i32.
        unsigned: [COLUMNS] i8, numbers of so many bits.
        signed: [COLUMNS] i8.
        bits: up to 8.
    """
    builder = args.builder
    if "+avx512vnni" in processor_features():
        multiply = args.function("llvm.x86.avx512.vpdpbusd.512", INTS, INTS, INTS, INTS)
        return builder.call(multiply, [total, builder.bitcast(unsigned, INTS), builder.bitcast(signed, INTS)])
    if "+avx2" not in processor_features():
        words = ir.VectorType(I16, COLUMNS)
        products = builder.mul(builder.zext(unsigned, words), builder.sext(signed, words))  # at most 255 * 128
        wide = builder.sext(products, ir.VectorType(I32, COLUMNS))
        for width in (COLUMNS, COLUMNS // 2):
            even, odd = (shuffled(builder, wide, wide, range(first, width, 2)) for first in (0, 1))
            wide = builder.add(even, odd)
        return builder.add(total, wide)
    if bits < 8:
        return builder.add(total, _pairs_twice(args, unsigned, signed))
    # The instruction saturates: a pair of products with 8 bits may have 17.
    upper = builder.and_(builder.lshr(unsigned, each(1, BYTES)), each(127, BYTES))
    total = builder.add(total, builder.shl(_pairs_twice(args, upper, signed), each(1)))
    return builder.add(total, _pairs_twice(args, builder.and_(unsigned, each(1, BYTES)), signed))


def _pairs_twice(args: Arguments, unsigned: Any, signed: Any) -> Any:
    """The sum of a lane's four products, by AVX2: of pairs in 16 bits, then of pairs of these."""
    builder, half = args.builder, COLUMNS // 2
    bytes_, words, ints = ir.VectorType(I8, half), ir.VectorType(I16, half // 2), ir.VectorType(I32, half // 4)
    of_bytes = args.function("llvm.x86.avx2.pmadd.ub.sw", words, bytes_, bytes_)
    of_words = args.function("llvm.x86.avx2.pmadd.wd", ints, words, words)
    halves = []
    for first in (0, half):
        both = [shuffled(builder, vector, vector, range(first, first + half)) for vector in (unsigned, signed)]
        halves.append(builder.call(of_words, [builder.call(of_bytes, both), each(1, words)]))
    return shuffled(builder, halves[0], halves[1], range(LANES))


@njit(inline="always")
def _aligned(rows, words):
    """An fp32 array [rows, words] that begins a cache line."""
    memory = np.empty(rows * words + CACHE_LINE // 4, np.float32)
    skipped = (-memory.ctypes.data % CACHE_LINE) // 4
    return memory[skipped : skipped + rows * words].reshape(rows, words)


@njit(inline="always")
def row_words(columns):
    """How many words a row of so many columns has."""
    groups, words = columns // COLUMNS, 0
    for kind in range(len(UNITS)):
        words += groups // UNITS[kind] * _UNIT_WORDS[kind]
        groups %= UNITS[kind]
    return words


@compiled
def fixed_point(x):
    """x [rows, columns] fp32, a multiple of COLUMNS of them, as [rows, words]. Where x is not finite, nor is what is
    made of it."""
    out = _aligned(len(x), row_words(x.shape[1]))
    for row in range(len(x)):
        store_row(out, x, row)
    return out


@intrinsic
def store_row(typing_context, out, x, row):
    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out x row")
        (out, words, _), (x, columns, _), row = args.array("out"), args.array("x"), args.index("row")
        x_at, out_at = builder.gep(x, [builder.mul(row, columns)]), builder.gep(out, [builder.mul(row, words)])
        groups_left = builder.sdiv(columns, I64(COLUMNS))
        for groups in UNITS:
            count, width, size = builder.sdiv(groups_left, I64(groups)), groups * COLUMNS, unit_vectors(groups) * LANES
            groups_left = builder.srem(groups_left, I64(groups))

            def one_unit(index, none, x_at=x_at, out_at=out_at, groups=groups, width=width, size=size):
                x_unit = builder.gep(x_at, [builder.mul(index, I64(width))])
                _store_unit(args, builder.gep(out_at, [builder.mul(index, I64(size))]), x_unit, groups)
                return none

            loop(builder, count, 1, [], one_unit)
            x_at = builder.gep(x_at, [builder.mul(count, I64(width))])
            out_at = builder.gep(out_at, [builder.mul(count, I64(size))])
        return context.get_dummy_value()

    return types.void(out, x, row), generate


def _store_unit(args: Arguments, out: Any, x: Any, groups: int) -> None:
    """The vectors of a unit, given the address of its columns."""
    builder, bytes_, fours = args.builder, ir.VectorType(I8, LANES), ir.VectorType(I32, LANES // PER_LANE)
    rint = args.function(f"llvm.rint.v{LANES}f32", VECTOR, VECTOR)
    words = builder.bitcast(out, I32.as_pointer())

    def at(vector: int, lane: int = 0) -> Any:
        return builder.gep(words, [I64(vector * LANES + lane)])

    for vector in range(groups * COLUMNS // LANES):
        address = builder.gep(x, [I64(vector * LANES)])
        values = builder.load(builder.bitcast(address, VECTOR.as_pointer()), align=4)
        step, inverse = _steps(args, values, PER_LANE * groups)
        n = builder.fptosi(builder.call(rint, [builder.fmul(values, inverse)]), INTS)
        # Adding 128 to each digit makes it unsigned; the highest bit of each is flipped back.
        flipped = builder.xor(builder.add(n, each(0x808080)), each(0x808080))
        digits = [
            builder.bitcast(builder.trunc(builder.lshr(flipped, each(shift)), bytes_), fours) for shift in (16, 8, 0)
        ]
        for four in range(LANES // PER_LANE):
            lane, group = lane_of(LANES * vector + PER_LANE * four, groups)
            for number, digit in enumerate(digits):
                builder.store(builder.extract_element(digit, I32(four)), at(number * groups + group, lane))
            if group == 0:
                one = builder.extract_element(builder.bitcast(step, INTS), I32(PER_LANE * four))
                builder.store(one, at(3 * groups + 2, lane))
    sums = [each(0)] * 3
    for number in range(3):
        for group in range(groups):
            vector = builder.bitcast(at(number * groups + group), BYTES.as_pointer())
            digit = builder.load(vector, align=CACHE_LINE)
            sums[number] = add_byte_products(args, sums[number], each(1, BYTES), digit, bits=1)
    high, middle, low = sums
    for number, total in enumerate((high, builder.add(builder.shl(middle, each(8)), low))):
        address = builder.bitcast(at(3 * groups + number), INTS.as_pointer())
        builder.store(builder.neg(total), address, align=CACHE_LINE)


def _steps(args: Arguments, x: Any, columns: int) -> tuple[Any, Any]:
    """The step of each so many neighbouring columns, and 1 / step."""
    builder = args.builder
    greater = args.function(f"llvm.umax.v{LANES}i32", INTS, INTS, INTS)
    bits = builder.and_(builder.bitcast(x, INTS), each(0x7FFFFFFF))
    for distance in (1, 2, 4, 8):
        if distance < columns:
            others = shuffled(builder, bits, bits, [lane ^ distance for lane in range(LANES)])
            bits = builder.call(greater, [bits, others])
    exponent = builder.lshr(builder.add(bits, each(_ROUNDS_UP)), each(23))
    exponent = builder.call(greater, [exponent, each(_LOWEST_EXPONENT)])
    is_finite = builder.icmp_unsigned("<", exponent, each(255))
    step = builder.select(is_finite, builder.shl(builder.sub(exponent, each(22)), each(23)), each(0x7FC00000))
    inverse = builder.shl(builder.sub(each(254 + 22), exponent), each(23))
    return builder.bitcast(step, VECTOR), builder.bitcast(inverse, VECTOR)

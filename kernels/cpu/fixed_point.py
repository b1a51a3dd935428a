"""Activations as products with matrices in blocks take them: 24-bit fixed-point numbers, in three digits of 8 bits.

For four columns of a row, the power of two `step` is the least for which |n| <= 8355711 = 127 * (2^16 + 2^8 + 1) in

    n = round(x / step) = d2 * 2^16 + d1 * 2^8 + d0          -128 <= d <= 127

So |n| is nearly 2^22 or more where |x| is greatest, and x - n * step is at most step / 2, or 2^-23 of the greatest |x|:
about what a sum of four fp32 products rounds. (Below 2^-96 the error is absolute, at most 2^-120.) An outlier
takes precision from its three neighbours alone. Sums of products with integers are integers, exact in any
order, and processors have instructions for them: 64 products and 48 additions at once.

A group of 64 columns has five vectors in the order of a group of weights (block_formats.py), with four neighbouring
columns a lane:

    d2, d1, d0    64 bytes each
    -sum(n)       of each lane, int32: what unsigned weights have too much
    step          of each lane, fp32
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from runtime.kernels.cpu.block_formats import COLUMNS
from runtime.kernels.cpu.blocks import BYTES, PER_LANE, each, shuffled
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

GROUP_VECTORS = 5
DIGIT_2, DIGIT_1, DIGIT_0, MINUS_SUM, STEP = range(GROUP_VECTORS)
GROUP_WORDS = GROUP_VECTORS * LANES
_LOWEST_EXPONENT = 30  # biased: step and 1 / step are normal numbers
_ROUNDS_UP = (1 << 24) - 2 * 8355711 + 1  # to a power of two, by how much a significand would be too large


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


@compiled
def fixed_point(x):
    """x [rows, columns] fp32, a multiple of COLUMNS of them, as [rows, groups * GROUP_WORDS]. Where x is not finite, so
    is what is made of it."""
    out = _aligned(len(x), x.shape[1] // COLUMNS * GROUP_WORDS)
    for row in range(len(x)):
        store_row(out, x, row)
    return out


@intrinsic
def store_row(typing_context, out, x, row):
    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out x row")
        (out, words, _), (x, columns, _), row = args.array("out"), args.array("x"), args.index("row")
        x_row, out_row = builder.gep(x, [builder.mul(row, columns)]), builder.gep(out, [builder.mul(row, words)])

        def one_group(column, none):
            at = builder.mul(builder.sdiv(column, I64(COLUMNS)), I64(GROUP_WORDS))
            for number, vector in enumerate(_group(args, x_row, column)):
                address = builder.gep(out_row, [builder.add(at, I64(number * LANES))])
                builder.store(vector, builder.bitcast(address, vector.type.as_pointer()), align=CACHE_LINE)
            return none

        loop(builder, columns, COLUMNS, [], one_group)
        return context.get_dummy_value()

    return types.void(out, x, row), generate


def _group(args: Arguments, x_row: Any, column: Any) -> list[Any]:
    """The vectors of the group that begins at a column."""
    builder, bytes_, fours = args.builder, ir.VectorType(I8, LANES), ir.VectorType(I32, LANES // PER_LANE)
    rint = args.function(f"llvm.rint.v{LANES}f32", VECTOR, VECTOR)
    digits: list[list[Any]] = [[], [], []]  # by column, the lowest first
    steps = []
    for vector in range(PER_LANE):
        at = builder.gep(x_row, [builder.add(column, I64(vector * LANES))])
        x = builder.load(builder.bitcast(at, VECTOR.as_pointer()), align=4)
        step, inverse = _steps(args, x)
        steps.append(step)
        n = builder.fptosi(builder.call(rint, [builder.fmul(x, inverse)]), INTS)
        # Adding 128 to each digit makes it unsigned; the highest bit of each is flipped back.
        flipped = builder.xor(builder.add(n, each(0x808080)), each(0x808080))
        for number, each_digit in enumerate(digits):
            each_digit.append(builder.trunc(builder.lshr(flipped, each(8 * number)), bytes_))
    d0, d1, d2 = (
        builder.bitcast(_in_order(builder, [builder.bitcast(part, fours) for part in digit]), BYTES) for digit in digits
    )
    firsts = range(0, LANES, PER_LANE)
    step = _in_order(builder, [shuffled(builder, part, part, firsts) for part in steps])
    total = each(0)
    for digit in (d2, d1, d0):
        total = add_byte_products(args, builder.shl(total, each(8)), each(1, BYTES), digit, bits=1)
    return [d2, d1, d0, builder.neg(total), step]


def _in_order(builder: Any, vectors: list[Any]) -> Any:
    """A group's lanes in its order, given four vectors of a quarter of them by column."""
    first, second = (shuffled(builder, vectors[at], vectors[at + 1], range(LANES // 2)) for at in (0, 2))
    return shuffled(builder, first, second, [lane // 2 + LANES // 2 * (lane % 2) for lane in range(LANES)])


def _steps(args: Arguments, x: Any) -> tuple[Any, Any]:
    """The step of each of LANES neighbouring columns, and 1 / step."""
    builder = args.builder
    greater = args.function(f"llvm.umax.v{LANES}i32", INTS, INTS, INTS)
    bits = builder.and_(builder.bitcast(x, INTS), each(0x7FFFFFFF))
    for distance in (1, 2):
        others = shuffled(builder, bits, bits, [lane ^ distance for lane in range(LANES)])
        bits = builder.call(greater, [bits, others])
    exponent = builder.lshr(builder.add(bits, each(_ROUNDS_UP)), each(23))
    exponent = builder.call(greater, [exponent, each(_LOWEST_EXPONENT)])
    is_finite = builder.icmp_unsigned("<", exponent, each(255))
    step = builder.select(is_finite, builder.shl(builder.sub(exponent, each(22)), each(23)), each(0x7FC00000))
    inverse = builder.shl(builder.sub(each(254 + 22), exponent), each(23))
    return builder.bitcast(step, VECTOR), builder.bitcast(inverse, VECTOR)

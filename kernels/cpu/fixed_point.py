"""Activations in the form that products with matrices in blocks take: 24-bit fixed point, in digits of 8 or 16 bits.

For the columns of a lane, which are 16 neighbours or, at the end of a row, 8 or 4 (block_formats.py), the power of two
`step` is the least for which |n| <= 8355711 = 127 * (2^16 + 2^8 + 1), the most that three digits of 8 bits can hold, in

    n = round(x / step)

(twice that for the two greatest significands that would still fit). So |n| is nearly 2^22 or more where |x| is
greatest, and x - n * step is at most step / 2, or 2^-23 of the greatest |x|: less than sums of fp32 products lose to
rounding on the way to the columns' total. (Below 2^-96 the error is absolute, at most 2^-120.) An outlier costs only
its neighbours precision. Sums of products with integers are integers, exact in any order, and processors have
instructions for them: 64 products and 64 additions at once (digits.py).

A unit of G groups of 64 columns, with a lane's columns in the order of a unit of weights, has these vectors of 16
words:

    the digits              the highest of each group, then the next, in one or two vectors each
    -sum(the highest)       of each lane, int32: for the zero or the minimum of the weights,
    -sum(the rest)          and the same for the rest: n - 2^16 * the highest digit
    ...                     the same of digits of another kind, if the processor takes two
    step                    of each lane, fp32
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from runtime.kernels.cpu.block_formats import COLUMNS, UNITS
from runtime.kernels.cpu.blocks import BYTES, lane_of
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.digits import PER_LANE, Digits, all_digits, digits_of, sums_of_products
from runtime.kernels.cpu.vectors import (
    CACHE_LINE,
    I32,
    I64,
    INTS,
    LANES,
    VECTOR,
    Arguments,
    each,
    intrinsic,
    loop,
    shuffled,
)

_LOWEST_EXPONENT = 30  # biased: step and 1 / step are normal numbers
_ROUNDS_UP = (1 << 24) - 2 * 8355711 + 1  # added to bits: a significand that is too large raises the exponent


def unit_vectors(groups: int) -> int:
    """How many vectors a unit of so many groups has, the last of them the step."""
    return sum(_vectors(kind, groups) for kind in all_digits()) + 1


def digits_at(kind: Digits, groups: int) -> int:
    """The vector of a unit at which digits of a kind begin."""
    before = all_digits()[: all_digits().index(kind)]
    return sum(_vectors(other, groups) for other in before)


def sums_at(kind: Digits, groups: int) -> int:
    """The vector of a unit at which the two sums of such digits begin."""
    return digits_at(kind, groups) + _vectors(kind, groups) - 2


def _vectors(kind: Digits, groups: int) -> int:
    """How many vectors such digits and their sums take."""
    return kind.per_number * kind.vectors * groups + 2


@njit(inline="always")
def _aligned(rows, words):
    """An fp32 array [rows, words] that begins at a cache line."""
    memory = np.empty(rows * words + CACHE_LINE // 4, np.float32)
    skipped = (-memory.ctypes.data % CACHE_LINE) // 4
    return memory[skipped : skipped + rows * words].reshape(rows, words)


def row_words(columns):
    """How many words a row of so many columns has."""


@overload(row_words)
def _row_words(columns):
    sizes = tuple(LANES * unit_vectors(groups) for groups in UNITS)

    def words_of_units(columns):
        groups, words = columns // COLUMNS, 0
        for kind in range(len(UNITS)):
            words += groups // UNITS[kind] * sizes[kind]
            groups %= UNITS[kind]
        return words

    return words_of_units


@compiled
def fixed_point(x):
    """x [rows, columns] fp32, a multiple of COLUMNS of them, in fixed point, [rows, words]. Where x is not finite, the
    step of its lane is NaN."""
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
    """Stores the vectors of a unit, given the address of its columns."""
    builder = args.builder
    rint = args.function(f"llvm.rint.v{LANES}f32", VECTOR, VECTOR)
    words = builder.bitcast(out, I32.as_pointer())

    def at(vector: int) -> Any:
        return builder.gep(words, [I64(vector * LANES)])

    def one_vector(number: Any, none: list[Any]) -> list[Any]:
        """Stores half a block: four columns for each group of a lane, one lane after another."""
        address = builder.gep(x, [builder.mul(number, I64(LANES))])
        values = builder.load(builder.bitcast(address, VECTOR.as_pointer()), align=4)
        step, inverse = _steps(args, values, PER_LANE * groups)
        n = builder.fptosi(builder.call(rint, [builder.fmul(values, inverse)]), INTS)
        half = builder.mul(builder.and_(number, I64(1)), I64(LANES // 2))
        first_lane = builder.gep(words, [builder.add(builder.lshr(number, I64(1)), half)])
        lanes = [lane_of(PER_LANE * four, groups) for four in range(LANES // PER_LANE)]

        def store(word: Any, vector: int, lane: int) -> None:
            builder.store(word, builder.gep(first_lane, [I64(vector * LANES + lane)]))

        for kind in all_digits():
            for digit_and_part, found in enumerate(digits_of(builder, n, kind)):
                digit, part = divmod(digit_and_part, kind.vectors)
                for four, (lane, group) in enumerate(lanes):
                    vector = digits_at(kind, groups) + (digit * groups + group) * kind.vectors + part
                    store(builder.extract_element(found, I32(four)), vector, lane)
        for four, (lane, group) in enumerate(lanes):
            if group == 0:
                one = builder.extract_element(builder.bitcast(step, INTS), I32(PER_LANE * four))
                store(one, unit_vectors(groups) - 1, lane)
        return none

    loop(builder, I64(groups * COLUMNS // LANES), 1, [], one_vector)
    for kind in all_digits():
        ones, start = [[each(1, BYTES)] * groups], (each(0), each(0))
        ((sums,),) = sums_of_products(args, kind, ones, 1, [at(digits_at(kind, groups))], [start])
        for number, total in enumerate(sums):
            address = builder.bitcast(at(sums_at(kind, groups) + number), INTS.as_pointer())
            builder.store(builder.neg(total), address, align=CACHE_LINE)


def _steps(args: Arguments, x: Any, columns: int) -> tuple[Any, Any]:
    """The step of every `columns` neighbouring columns, and 1 / step."""
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

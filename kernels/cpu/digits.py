"""Splits activations in 24-bit fixed point (fixed_point.py) into digits, and sums the digits' products with the
integers of a matrix in blocks.

    n = d2 * 2^16 + d1 * 2^8 + d0     -128 <= d <= 127          a lane's four columns in a word of 32 bits
    n = d1 * 2^16 + d0                -2^15 <= d0 < 2^15        in two words, of columns 0 and 2 and of 1 and 3

A processor that multiplies bytes and adds four products in 32 bits (AVX-512 VNNI) takes the former. Others add two
products of bytes in 16 bits (AVX2), which can hold the sums of two groups or more if weights have up to 6 bits; for
weights of 8 bits they take the latter, and add two products in 32 bits. Either way the sums of products are the same
integers, and exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir

from runtime.kernels.cpu.vectors import I8, I16, I32, I64, INTS, LANES, Arguments, each, processor_features, shuffled

PER_LANE = 4  # columns of a group in a lane
Sums = tuple[Any, Any]  # in two parts of [LANES] i32, high * 2^16 + low, high from the highest digit
_HALF = LANES // 2  # of the lanes: as many as a register of AVX2 has
_HALF_BYTES, _HALF_WORDS = ir.VectorType(I8, 4 * _HALF), ir.VectorType(I16, LANES)
_HALF_INTS = ir.VectorType(I32, _HALF)


class Digits(NamedTuple):
    """A way to split numbers into digits."""

    per_number: int  # the highest first
    vectors: int  # of each digit of a group


_BYTES, _WORDS = Digits(3, 1), Digits(2, 2)


def multiplies_bytes() -> bool:
    """Whether the processor adds four products of bytes at a time."""
    return "+avx512vnni" in processor_features()


def all_digits() -> tuple[Digits, ...]:
    """The kinds of digits that activations are split into on this processor."""
    return (_BYTES,) if multiplies_bytes() else (_BYTES, _WORDS)


def digits_for(bits: int) -> Digits:
    """The kind of digits that is multiplied by unsigned numbers of so many bits."""
    return _BYTES if multiplies_bytes() or _groups_in_16_bits(bits) else _WORDS


def _groups_in_16_bits(bits: int) -> int:
    """For how many groups the sums of two products each, of numbers of so many bits and digits of 8 bits, can be added
    in 16 bits."""
    return (1 << 15) // (2 * ((1 << bits) - 1) * 128)


def digits_of(builder: Any, n: Any, kind: Digits) -> list[Any]:
    """The words of LANES neighbouring numbers n, [LANES] i32, in each vector of each digit: [LANES / PER_LANE] i32."""
    words = ir.VectorType(I32, LANES // PER_LANE)
    if kind == _BYTES:
        # Adding 128 to each digit makes it unsigned; the highest bit of each is flipped back.
        flipped = builder.xor(builder.add(n, each(0x808080)), each(0x808080))
        return [
            builder.bitcast(builder.trunc(builder.lshr(flipped, each(shift)), ir.VectorType(I8, LANES)), words)
            for shift in (16, 8, 0)
        ]
    found = []
    for digit in (builder.lshr(builder.add(n, each(1 << 15)), each(16)), n):
        halves = builder.trunc(digit, ir.VectorType(I16, LANES))
        for odd in (0, 1):
            found.append(builder.bitcast(shuffled(builder, halves, halves, range(odd, LANES, 2)), words))
    return found


def sums_of_products(
    args: Arguments, kind: Digits, weights: list[list[Any]], bits: int, rows: list[Any], starts: Iterable[Sums]
) -> Iterator[list[Sums]]:
    """Sums, for each lane, of the products of a unit's columns, in an order that leaves them in registers: with VNNI,
    where there are 32 registers, the caller handles a row's sums before the next row's products are taken.

    Args:
        args: of the intrinsic that needs the sums.
        kind: of digits.
        weights: for each output the integers of each group, [COLUMNS] i8, unsigned.
        bits: of these integers.
        rows: for each row of activations the address of the unit's digits.
        starts: what the sums of each row begin with.

    Yields:
        For each row the sums of each output.
    """
    if multiplies_bytes():
        for row, start in zip(rows, starts, strict=True):
            yield _sums_of_fours(args, weights, row, start)
        return
    halves: list[list[list[Sums]]]
    if kind == _BYTES:
        halves = [_half_sums_of_bytes(args, weights, bits, rows, lane) for lane in (0, _HALF)]
    else:
        halves = [_half_sums_of_words(args, weights, rows, lane) for lane in (0, _HALF)]

    def added(start: Any, lower: Any, upper: Any) -> Any:
        return args.builder.add(start, shuffled(args.builder, lower, upper, range(LANES)))

    for (high, low), lower, upper in zip(starts, *halves, strict=True):
        yield [
            (added(high, *highs), added(low, *lows))
            for highs, lows in (zip(*both, strict=True) for both in zip(lower, upper, strict=True))
        ]


def _sums_of_fours(args: Arguments, weights: list[list[Any]], row: Any, start: Sums) -> list[Sums]:
    """The sums of a row, with VNNI. Outputs share the activations that are loaded."""
    builder, groups = args.builder, len(weights[0])
    multiply = args.function("llvm.x86.avx512.vpdpbusd.512", INTS, INTS, INTS, INTS)
    totals = [[start[0], each(0), start[1]] for _ in weights]
    for digit in range(3):
        for group in range(groups):
            numbers = _load(builder, row, (digit * groups + group) * LANES, INTS)
            for total, q in zip(totals, weights, strict=True):
                total[digit] = builder.call(multiply, [total[digit], builder.bitcast(q[group], INTS), numbers])
    return [(high, builder.add(builder.shl(middle, each(8)), low)) for high, middle, low in totals]


def _half_sums_of_bytes(
    args: Arguments, weights: list[list[Any]], bits: int, rows: list[Any], lane: int
) -> list[list[Sums]]:
    """The sums of half the lanes, from `lane` on, with digits of 8 bits. Rows share the integers."""
    builder, groups, at_once = args.builder, len(weights[0]), _groups_in_16_bits(bits)
    totals = [[[each(0, _HALF_INTS)] * _BYTES.per_number for _ in weights] for _ in rows]
    for first in range(0, groups, at_once):
        in_16_bits = [[[each(0, _HALF_WORDS)] * _BYTES.per_number for _ in weights] for _ in rows]
        for group in range(first, min(first + at_once, groups)):
            for output, q in enumerate(weights):
                numbers = _half(builder, q[group], lane)
                for row, sums in zip(rows, in_16_bits, strict=True):
                    for digit in range(_BYTES.per_number):
                        digits = _load(builder, row, (digit * groups + group) * LANES + lane, _HALF_BYTES)
                        sums[output][digit] = builder.add(sums[output][digit], _sums_of_bytes(args, numbers, digits))
        for total, sums in zip(totals, in_16_bits, strict=True):
            for output, digit in itertools.product(range(len(weights)), range(_BYTES.per_number)):
                pairs = _sums_of_words(args, sums[output][digit], each(1, _HALF_WORDS))
                total[output][digit] = builder.add(total[output][digit], pairs)
    return [
        [(high, builder.add(builder.shl(middle, each(8, _HALF_INTS)), low)) for high, middle, low in total]
        for total in totals
    ]


def _half_sums_of_words(args: Arguments, weights: list[list[Any]], rows: list[Any], lane: int) -> list[list[Sums]]:
    """The same with digits of 16 bits."""
    builder, groups = args.builder, len(weights[0])
    totals = [[[each(0, _HALF_INTS)] * _WORDS.per_number for _ in weights] for _ in rows]
    for group in range(groups):
        for output, q in enumerate(weights):
            words = builder.bitcast(_half(builder, q[group], lane), _HALF_WORDS)
            even, odd = builder.and_(words, each(255, _HALF_WORDS)), builder.lshr(words, each(8, _HALF_WORDS))
            for row, sums in zip(rows, totals, strict=True):
                for digit in range(_WORDS.per_number):
                    for vector, factor in enumerate((even, odd)):
                        at = ((digit * groups + group) * _WORDS.vectors + vector) * LANES + lane
                        pairs = _sums_of_words(args, factor, _load(builder, row, at, _HALF_WORDS))
                        sums[output][digit] = builder.add(sums[output][digit], pairs)
    return [[(high, low) for high, low in total] for total in totals]


def _half(builder: Any, q: Any, lane: int) -> Any:
    """The bytes of half the lanes, from `lane` on."""
    return shuffled(builder, q, q, range(PER_LANE * lane, PER_LANE * (lane + _HALF)))


def _sums_of_bytes(args: Arguments, unsigned: Any, signed: Any) -> Any:
    """The sums of two neighbouring products each, in 16 bits, which must be able to hold them."""
    builder, wide = args.builder, ir.VectorType(I16, 4 * _HALF)
    if "+avx2" in processor_features():
        multiply = args.function("llvm.x86.avx2.pmadd.ub.sw", _HALF_WORDS, _HALF_BYTES, _HALF_BYTES)
        return builder.call(multiply, [unsigned, signed])
    return _sums_of_pairs(builder, builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide)))


def _sums_of_words(args: Arguments, first: Any, second: Any) -> Any:
    """The sums of two neighbouring products each, in 32 bits."""
    builder = args.builder
    if "+avx2" in processor_features():
        multiply = args.function("llvm.x86.avx2.pmadd.wd", _HALF_INTS, _HALF_WORDS, _HALF_WORDS)
        return builder.call(multiply, [first, second])
    return _sums_of_pairs(builder, builder.mul(builder.sext(first, INTS), builder.sext(second, INTS)))


def _sums_of_pairs(builder: Any, numbers: Any) -> Any:
    count = numbers.type.count
    return builder.add(*(shuffled(builder, numbers, numbers, range(odd, count, 2)) for odd in (0, 1)))


def _load(builder: Any, row: Any, word: int, kind: Any) -> Any:
    """The vector that begins at a word; its address is a multiple of its size."""
    address = builder.bitcast(builder.gep(row, [I64(word)]), kind.as_pointer())
    return builder.load(address, align=kind.count * kind.element.width // 8)

"""The digits of the 24-bit numbers that activations in fixed point are (fixed_point.py), and the sums of their products
with the integers of a matrix in blocks.

A processor that multiplies bytes and adds four products at a time (AVX-512 VNNI) has three digits of 8 bits:

    n = d2 * 2^16 + d1 * 2^8 + d0     -128 <= d <= 127          a lane's four columns in a word of 32 bits

Others, which add two products of 16 bits at a time (since SSE2; bytes would saturate), have two digits:

    n = d1 * 2^16 + d0                -2^15 <= d0 < 2^15        in two words, of columns 0 and 2 and of 1 and 3

Sums of products are the same integers either way, and exact.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from runtime.kernels.cpu.blocks import each, shuffled
from runtime.kernels.cpu.vectors import I8, I16, I32, I64, INTS, LANES, Arguments, processor_features

PER_LANE = 4  # columns of a group
_HALF = LANES // 2
_HALF_INTS, _HALF_WORDS = ir.VectorType(I32, _HALF), ir.VectorType(I16, LANES)


def multiplies_bytes() -> bool:
    """Whether digits have 8 bits."""
    return "+avx512vnni" in processor_features()


def digits() -> tuple[int, int]:
    """How many digits there are, the highest first, and how many vectors each has of a group."""
    return (3, 1) if multiplies_bytes() else (2, 2)


def digits_of(builder: Any, n: Any) -> list[Any]:
    """The words of LANES neighbouring numbers n, [LANES] i32, in each vector of each digit: [LANES / PER_LANE] i32."""
    words = ir.VectorType(I32, LANES // PER_LANE)
    if multiplies_bytes():
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
    args: Arguments, q: list[Any], rows: list[Any], starts: list[tuple[Any, Any]]
) -> list[tuple[Any, Any]]:
    """Sums of the products of a unit's columns, for each lane.

    Args:
        args: of the intrinsic that takes them.
        q: of each group, [COLUMNS] i8, unsigned.
        rows: for each row of activations the address of the unit's digits.
        starts: for each row what its sum begins with, in two parts of [LANES] i32 as below.

    Returns:
        For each row the sum of q * n in two parts: high * 2^16 + low, high from the highest digit.
    """
    builder = args.builder
    if multiplies_bytes():
        multiply = args.function("llvm.x86.avx512.vpdpbusd.512", INTS, INTS, INTS, INTS)
        factors = [builder.bitcast(group, INTS) for group in q]
        found = []
        for row, (high, low) in zip(rows, starts, strict=True):
            totals = [high, each(0), low]
            for digit in range(3):
                for group, factor in enumerate(factors):
                    vector = _load(builder, row, (digit * len(q) + group) * LANES, INTS)
                    totals[digit] = builder.call(multiply, [totals[digit], factor, vector])
            found.append((totals[0], builder.add(builder.shl(totals[1], each(8)), totals[2])))
        return found
    halves = [_half_sums(args, q, rows, starts, lane) for lane in (0, _HALF)]
    return [
        (shuffled(builder, high, next_high, range(LANES)), shuffled(builder, low, next_low, range(LANES)))
        for (high, low), (next_high, next_low) in zip(*halves, strict=True)
    ]


def _half_sums(
    args: Arguments, q: list[Any], rows: list[Any], starts: list[tuple[Any, Any]], lane: int
) -> list[tuple[Any, Any]]:
    """Those of half the lanes, from this one on, as many as a register of AVX2 has: sixteen hold what is added to."""
    builder, (count, width) = args.builder, digits()
    lanes, columns = range(lane, lane + _HALF), range(PER_LANE * lane, PER_LANE * (lane + _HALF))
    factors = []
    for group in q:
        words = builder.bitcast(shuffled(builder, group, group, columns), _HALF_WORDS)
        factors.append((builder.and_(words, each(255, _HALF_WORDS)), builder.lshr(words, each(8, _HALF_WORDS))))
    found = []
    for row, start in zip(rows, starts, strict=True):
        totals = [shuffled(builder, part, part, lanes) for part in start]
        for group, both in enumerate(factors):
            for digit in range(count):
                for vector, factor in enumerate(both):
                    at = ((digit * len(q) + group) * width + vector) * LANES + lane
                    pairs = _sums_of_pairs(args, factor, _load(builder, row, at, _HALF_WORDS))
                    totals[digit] = builder.add(totals[digit], pairs)
        found.append((totals[0], totals[1]))
    return found


def _sums_of_pairs(args: Arguments, first: Any, second: Any) -> Any:
    """The sums of two neighbouring products each."""
    builder = args.builder
    if "+avx2" in processor_features():
        multiply = args.function("llvm.x86.avx2.pmadd.wd", _HALF_INTS, _HALF_WORDS, _HALF_WORDS)
        return builder.call(multiply, [first, second])
    products = builder.mul(builder.sext(first, INTS), builder.sext(second, INTS))
    return builder.add(*(shuffled(builder, products, products, range(odd, LANES, 2)) for odd in (0, 1)))


def _load(builder: Any, row: Any, word: int, kind: Any) -> Any:
    """A vector from a word on, whose address is a multiple of its size."""
    address = builder.bitcast(builder.gep(row, [I64(word)]), kind.as_pointer())
    return builder.load(address, align=kind.count * kind.element.width // 8)

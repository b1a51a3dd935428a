"""The digits of the 24-bit numbers that activations in fixed point are (fixed_point.py), and the sums of their products
with the integers of a matrix in blocks.

A processor that multiplies bytes and adds four products at a time (AVX-512 VNNI) has three digits of 8 bits:

    n = d2 * 2^16 + d1 * 2^8 + d0     -128 <= d <= 127          a lane's four columns in a word of 32 bits

Others, which add two products of 16 bits at a time (since SSE2; bytes would saturate), have two digits:

    n = d1 * 2^16 + d0                -2^15 <= d0 < 2^15        in two words, of columns 0 and 2 and of 1 and 3

Sums of products are the same integers either way, and exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llvmlite import ir

from runtime.kernels.cpu.blocks import each, shuffled
from runtime.kernels.cpu.vectors import I8, I16, I32, I64, INTS, LANES, Arguments, processor_features

PER_LANE = 4  # columns of a group
Sums = tuple[Any, Any]  # in two parts of [LANES] i32, high * 2^16 + low, high from the highest digit
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
    args: Arguments, weights: list[list[Any]], rows: list[Any], starts: Iterable[Sums]
) -> Iterator[list[Sums]]:
    """Sums of the products of a unit's columns, for each lane, in an order that leaves them in registers: with bytes,
    where there are 32, what the caller does with a row's sums comes before the next row's products.

    Args:
        args: of the intrinsic that takes them.
        weights: for each output the integers of each group, [COLUMNS] i8, unsigned.
        rows: for each row of activations the address of the unit's digits.
        starts: what the sums of each row begin with.

    Yields:
        For each row the sums of each output.
    """
    if multiplies_bytes():
        for row, start in zip(rows, starts, strict=True):
            yield _sums_of_bytes(args, weights, row, start)
        return
    starts = list(starts)
    halves = [_half_sums(args, weights, rows, starts, lane) for lane in (0, _HALF)]
    for lower, upper in zip(*halves, strict=True):
        yield [
            (shuffled(args.builder, high, next_high, range(LANES)), shuffled(args.builder, low, next_low, range(LANES)))
            for (high, low), (next_high, next_low) in zip(lower, upper, strict=True)
        ]


def _sums_of_bytes(args: Arguments, weights: list[list[Any]], row: Any, start: Sums) -> list[Sums]:
    """Those of a row. Outputs share what is loaded."""
    builder, groups = args.builder, len(weights[0])
    multiply = args.function("llvm.x86.avx512.vpdpbusd.512", INTS, INTS, INTS, INTS)
    totals = [[start[0], each(0), start[1]] for _ in weights]
    for digit in range(3):
        for group in range(groups):
            numbers = _load(builder, row, (digit * groups + group) * LANES, INTS)
            for total, q in zip(totals, weights, strict=True):
                total[digit] = builder.call(multiply, [total[digit], builder.bitcast(q[group], INTS), numbers])
    return [(high, builder.add(builder.shl(middle, each(8)), low)) for high, middle, low in totals]


def _half_sums(
    args: Arguments, weights: list[list[Any]], rows: list[Any], starts: list[Sums], lane: int
) -> list[list[Sums]]:
    """Those of half the lanes, from this one on, as many as a register of AVX2 has. Rows share the integers."""
    builder, (count, width), groups = args.builder, digits(), len(weights[0])
    columns = range(PER_LANE * lane, PER_LANE * (lane + _HALF))
    totals = [
        [[shuffled(builder, part, part, range(lane, lane + _HALF)) for part in start] for _ in weights]
        for start in starts
    ]
    for group in range(groups):
        for output, q in enumerate(weights):
            words = builder.bitcast(shuffled(builder, q[group], q[group], columns), _HALF_WORDS)
            even, odd = builder.and_(words, each(255, _HALF_WORDS)), builder.lshr(words, each(8, _HALF_WORDS))
            for row, sums in zip(rows, totals, strict=True):
                for digit in range(count):
                    for vector, factor in enumerate((even, odd)):
                        at = ((digit * groups + group) * width + vector) * LANES + lane
                        pairs = _sums_of_pairs(args, factor, _load(builder, row, at, _HALF_WORDS))
                        sums[output][digit] = builder.add(sums[output][digit], pairs)
    return [[(high, low) for high, low in sums] for sums in totals]


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

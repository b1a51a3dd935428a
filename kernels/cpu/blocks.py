"""Reads a unit of one, two or four groups of 64 columns of a matrix in blocks (block_formats.py, records.py) into
registers: the integers q of each group and, for each lane of four of them, a scale and in some formats a minimum, both
the same in all groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import overload

from runtime.kernels.cpu import availability
from runtime.kernels.cpu.block_formats import COLUMNS, INT8, SCALE_BYTES, UNITS, Format
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.records import format_of
from runtime.kernels.cpu.vectors import (
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    VECTOR,
    Arguments,
    each,
    each_float,
    intrinsic,
    loop,
    processor_features,
    shuffled,
    splat,
)

BYTES = ir.VectorType(I8, COLUMNS)
_LANE_BYTES, _FLOAT, _HALF = ir.VectorType(I8, LANES), ir.FloatType(), ir.HalfType()


def converts_halves() -> bool:
    """Whether the processor has instructions that convert fp16."""
    return "+f16c" in processor_features()


class Weights(NamedTuple):
    """A unit's weights: w = scale * (q - 2^zero_bits), or scale * q + minimum."""

    q: list[Any]  # BYTES of each group, unsigned
    scale: Any  # VECTOR
    minimum: Any  # VECTOR or None


class Row(NamedTuple):
    """The address of a row, and that of its first unit with a reader's number of groups."""

    start: Any
    units: Any


class Blocks:
    """Reads those units of a format that have a given number of groups.

    Args:
        args: of the intrinsic that reads them.
        form: the format.
        groups: 1, 2 or 4; 4 where a block has 256 columns.
    """

    def __init__(self, args: Arguments, form: Format, groups: int) -> None:
        self._args, self._builder, self.form, self.groups = args, args.builder, form, groups
        self.bytes = form.unit_bytes(groups)
        self.bits = 8 if form.is_row else int(form.name[1])  # of q
        self.zero_bits = self.bits - 1 if form.layout in ("Q4_0", "Q5_0", "Q6_K", "Q8_0", INT8) else None

    def row(self, weight: Any, index: Any, blocks: Any) -> Row:
        """A row of an array of records [rows, blocks]."""
        builder, first = self._builder, I64(SCALE_BYTES if self.form.is_row else 0)
        start = builder.gep(
            builder.bitcast(weight, I8.as_pointer()), [builder.mul(index, builder.mul(blocks, I64(self.form.bytes)))]
        )
        for groups in UNITS[: UNITS.index(self.groups)]:
            first = builder.add(first, builder.mul(self._units(groups, blocks), I64(self.form.unit_bytes(groups))))
        return Row(start, builder.gep(start, [first]))

    def units(self, blocks: Any) -> Any:
        """How many of these units a row of so many blocks has."""
        return self._units(self.groups, blocks)

    def column(self, blocks: Any) -> Any:
        """The column at which these units begin, in a row of so many blocks."""
        builder, column = self._builder, I64(0)
        for groups in UNITS[: UNITS.index(self.groups)]:
            column = builder.add(column, builder.mul(self._units(groups, blocks), I64(groups * COLUMNS)))
        return column

    def _units(self, groups: int, blocks: Any) -> Any:
        all_groups = self._builder.mul(blocks, I64(self.form.columns // COLUMNS))
        if groups == UNITS[0]:
            return self._builder.sdiv(all_groups, I64(groups))
        return self._builder.and_(self._builder.sdiv(all_groups, I64(groups)), I64(1))

    def address(self, row: Row, index: Any) -> Any:
        """Where a row's unit number `index` begins."""
        return self._at(row.units, self._builder.mul(index, I64(self.bytes)))

    def weights(self, row: Row, index: Any) -> Weights:
        """A row's unit number `index`."""
        address = self.address(row, index)
        if self.form.is_row:
            scale = splat(self._builder, self._load(row.start, 0, _FLOAT))
            return Weights([self._load(address, COLUMNS * group, BYTES) for group in range(self.groups)], scale, None)
        return _UNITS[self.form.layout](self, address)

    def values(self, weights: Weights, vector: int) -> Any:
        """LANES weights as fp32: number `vector` of the vectors of a unit, in the order of columns."""
        builder = self._builder
        words = ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
        lanes = []
        for four in range(4):
            lane, group = lane_of(LANES * vector + 4 * four, self.groups)
            word = builder.extract_element(builder.bitcast(weights.q[group], INTS), I32(lane))
            words = builder.insert_element(words, word, I32(four))
            lanes += [lane] * 4
        q = builder.zext(builder.bitcast(words, _LANE_BYTES), INTS)
        if self.zero_bits is not None:
            q = builder.sub(q, each(1 << self.zero_bits))
        numbers, scale = builder.sitofp(q, VECTOR), shuffled(builder, weights.scale, weights.scale, lanes)
        if weights.minimum is None:
            return builder.fmul(numbers, scale)
        minimum = shuffled(builder, weights.minimum, weights.minimum, lanes)
        return builder.call(self._args.fma, [numbers, scale, minimum])

    # What follows reads parts of one unit.

    def _at(self, address: Any, offset: Any) -> Any:
        return self._builder.gep(address, [I64(offset) if isinstance(offset, int) else offset])

    def _load(self, block: Any, offset: int, kind: Any) -> Any:
        return self._builder.load(self._builder.bitcast(self._at(block, offset), kind.as_pointer()), align=1)

    def _widened(self, halves: Any, kind: Any) -> Any:
        """The format's fp16 or bf16 numbers, given as i16, as fp32."""
        builder = self._builder
        ints = I32 if kind == _FLOAT else INTS

        def number(value: Any) -> Any:
            return ir.Constant(ints, value if ints == I32 else [value] * LANES)

        if self.form.has_bfloats:
            return builder.bitcast(builder.shl(builder.zext(halves, ints), number(16)), kind)
        if converts_halves():
            return builder.fpext(
                builder.bitcast(halves, _HALF if kind == _FLOAT else ir.VectorType(_HALF, LANES)), kind
            )
        bits = builder.zext(halves, ints)
        magnitude = builder.shl(builder.and_(bits, number(0x7FFF)), number(13))  # 2^-112 of it, also if subnormal
        sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
        rest = ir.Constant(kind, 2.0**112) if kind == _FLOAT else each_float(2.0**112)
        return builder.fmul(builder.bitcast(builder.or_(magnitude, sign), kind), rest)

    def _half(self, block: Any, offset: int) -> Any:
        """An fp16 as fp32."""
        return self._widened(self._load(block, offset, I16), _FLOAT)

    def _halves(self, unit: Any, offset: int) -> Any:
        """The 16-bit numbers of a unit's blocks as fp32, in turn: one in each lane."""
        blocks = 2 * self.groups
        halves = self._load(unit, offset, ir.VectorType(I16, blocks))
        return self._widened(shuffled(self._builder, halves, halves, [lane % blocks for lane in range(LANES)]), VECTOR)

    def _nibbles(self, block: Any, offset: int) -> Any:
        """The lower halves of 32 bytes, then their upper halves."""
        builder, words = self._builder, ir.VectorType(I16, COLUMNS // 2)
        once = self._load(block, offset, ir.VectorType(I16, LANES))
        twice = shuffled(builder, once, once, [*range(LANES), *range(LANES)])
        shifted = builder.lshr(twice, ir.Constant(words, [0] * LANES + [4] * LANES))
        return builder.and_(builder.bitcast(shifted, BYTES), each(15, BYTES))

    def _highest_bits(self, unit: Any, offset: int, q: list[Any]) -> list[Any]:
        """q of each group with their highest bits, which are stored from byte `offset` on."""
        builder, words = self._builder, ir.VectorType(I32, 2 * self.groups)
        if availability.takes_masks():
            masks = [
                builder.bitcast(self._load(unit, offset + 8 * group, I64), ir.VectorType(ir.IntType(1), COLUMNS))
                for group in range(self.groups)
            ]
            return [
                builder.select(mask, builder.add(each_q, each(16, BYTES)), each_q)
                for mask, each_q in zip(masks, q, strict=True)
            ]
        once = self._load(unit, offset, words)
        bits = shuffled(builder, once, once, [lane % words.count for lane in range(LANES)])
        found = []
        for group, each_q in enumerate(q):
            shifts = [4 - (LANES * group + lane) // words.count for lane in range(LANES)]  # to bit 4 of each byte
            left, right = ([max(sign * shift, 0) for shift in shifts] for sign in (1, -1))
            moved = builder.lshr(builder.shl(bits, ir.Constant(INTS, left)), ir.Constant(INTS, right))
            found.append(builder.or_(each_q, builder.and_(builder.bitcast(moved, BYTES), each(16, BYTES))))
        return found

    # The formats.

    def _of_32(self, unit: Any) -> Weights:
        """Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0."""
        scale = self._halves(unit, 0)
        if self.form.layout == "Q8_0":
            q = [self._load(unit, 4 * self.groups + COLUMNS * group, BYTES) for group in range(self.groups)]
            return Weights(q, scale, None)
        has_minimum = self.form.layout.endswith("_1")
        at = (8 if has_minimum else 4) * self.groups
        q = self._all_nibbles(unit, at if self.bits == 5 else None)
        return Weights(q, scale, self._halves(unit, 4 * self.groups) if has_minimum else None)

    def _all_nibbles(self, unit: Any, bits_at: int | None) -> list[Any]:
        """q of each group: nibbles, which come last in a unit, with highest bits from byte `bits_at` on if there are
        any."""
        first = self.bytes - COLUMNS // 2 * self.groups
        q = [self._nibbles(unit, first + COLUMNS // 2 * group) for group in range(self.groups)]
        if bits_at is None:
            return q
        return self._highest_bits(unit, bits_at, q)

    def _k(self, unit: Any) -> Weights:
        """Q4_K and Q5_K."""
        builder = self._builder
        small = builder.sitofp(builder.zext(self._load(unit, 4, _LANE_BYTES), INTS), VECTOR)  # s, then t
        d, e = splat(builder, self._half(unit, 0)), splat(builder, builder.fneg(self._half(unit, 2)))
        scaled = builder.fmul(small, shuffled(builder, d, e, [*range(8), *[LANES] * 8]))
        scale, minimum = (
            shuffled(builder, scaled, scaled, [first + lane % 8 for lane in range(LANES)]) for first in (0, 8)
        )
        return Weights(self._all_nibbles(unit, 20 if self.bits == 5 else None), scale, minimum)

    def _q6_k(self, unit: Any) -> Weights:
        builder = self._builder
        small = builder.sitofp(builder.sext(self._load(unit, 2, _LANE_BYTES), INTS), VECTOR)
        scale = builder.fmul(small, splat(builder, self._half(unit, 0)))
        return Weights([self._six_bits(unit, 18 + 48 * group) for group in range(self.groups)], scale, None)

    def _six_bits(self, unit: Any, start: int) -> Any:
        builder = self._builder
        pairs = self._load(unit, start + 32, ir.VectorType(I32, 4))
        pairs = shuffled(builder, pairs, pairs, [*range(4)] * 4)
        left, right = ([4] * 4 + [2] * 4 + [0] * 8, [0] * 12 + [2] * 4)  # to bits 4 and 5
        shifted = builder.lshr(builder.shl(pairs, ir.Constant(INTS, left)), ir.Constant(INTS, right))
        return builder.or_(self._nibbles(unit, start), builder.and_(builder.bitcast(shifted, BYTES), each(0x30, BYTES)))


_UNITS: dict[str, Callable[[Blocks, Any], Weights]] = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"), Blocks._of_32),
    **dict.fromkeys(("Q4_K", "Q5_K"), Blocks._k),
    "Q6_K": Blocks._q6_k,
}


def readers(args: Arguments, form: Format) -> list[Blocks]:
    """A reader for each kind of unit that rows may have."""
    return [Blocks(args, form, groups) for groups in UNITS[: 1 if form.columns == UNITS[0] * COLUMNS else None]]


def lane_of(column: int, groups: int) -> tuple[int, int]:
    """The lane and the group, in a unit of so many groups, that have a column and its three neighbours."""
    block, within = divmod(column, 32)
    return block + 2 * groups * (within // (4 * groups)), within // 4 % groups


@intrinsic
def dequantize_row(typing_context, out, place, weight, index):
    """out[place] = the values of weight[index], for out [rows, columns] fp32 and an array of records."""

    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out place weight index")
        out, columns, _ = args.array("out")
        weight, blocks, dtype = args.array("weight")
        form = format_of(dtype)
        assert form is not None, "an array of records"
        out_row = builder.gep(out, [builder.mul(args.index("place"), columns)])
        for reader in readers(args, form):
            row = reader.row(weight, args.index("index"), blocks)

            def one_unit(index, none, reader=reader, row=row):
                weights, first = reader.weights(row, index), builder.mul(index, I64(reader.groups * COLUMNS))
                first = builder.add(first, reader.column(blocks))
                for vector in range(reader.groups * COLUMNS // LANES):
                    at = builder.gep(out_row, [builder.add(first, I64(vector * LANES))])
                    builder.store(reader.values(weights, vector), builder.bitcast(at, VECTOR.as_pointer()), align=4)
                return none

            loop(builder, reader.units(blocks), 1, [], one_unit)
        return context.get_dummy_value()

    return types.void(out, place, weight, index), generate


@compiled
def dequantize(out, weight):
    """out [rows, columns] fp32 = the values of an array of records."""
    for row in range(len(out)):
        dequantize_row(out, row, weight, row)


def row_of(table, index):
    """Row `index` of a matrix [outputs, columns]: of an array of records, its values in fp32."""


@overload(row_of)
def _row_of(table, index):
    form = format_of(table.dtype)
    if form is None:
        return lambda table, index: table[index]
    block_columns = form.columns

    def dequantized(table, index):
        values = np.empty((1, table.shape[1] * block_columns), np.float32)
        dequantize_row(values, 0, table, index)
        return values[0]

    return dequantized

"""Matrices in blocks (block_formats.py) as arrays of records, and how a group of 64 columns comes out in registers: the
integers q, and for each lane of four of them a scale and, in some formats, a minimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import models, overload, register_model, typeof_impl
from numba.np.numpy_support import from_dtype

from runtime.kernels.cpu.block_formats import BFLOATS, COLUMNS, INT8, SCALE_BYTES, Format, Part, format_named
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.vectors import (
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

PER_LANE = COLUMNS // LANES
BYTES = ir.VectorType(I8, COLUMNS)
_LANE_BYTES, _FLOAT, _HALF = ir.VectorType(I8, LANES), ir.FloatType(), ir.HalfType()


class Records(np.ndarray):
    """An array of blocks, whose dtype tells compiled kernels its format."""


class Record(types.Record):
    """numba's type of a block. In the names of compiled functions numba puts a number for a record, counted within the
    process: two processes that keep code on disk could give two formats one name, and linking would take one of them
    for both. So this one is written out."""

    @property
    def mangling_args(self) -> tuple[str, tuple[Any, ...]]:
        return self.name, ()


register_model(Record)(models.RecordModel)


@typeof_impl.register(Records)
def _typeof_records(array: Records, context: Any) -> types.Array:
    ((name, *_),) = array.dtype.descr
    field: Any = {"type": from_dtype(array.dtype[name]), "offset": 0}
    record = Record([(name, field)], array.dtype.itemsize, aligned=False)
    return types.Array(record, array.ndim, "C", aligned=array.flags.aligned)


def records(part: Part) -> np.ndarray:
    """A part as an array [rows, blocks]; bf16 as int16 [rows, columns], which arithmetic.py takes beside fp32."""
    if part.format == BFLOATS:
        return part.data.numpy().view(np.int16)
    block = np.dtype([(part.format.name, np.uint8, part.format.bytes)])
    return part.data.numpy().view(block).view(Records)


def format_of(dtype: Any) -> Format | None:
    """The format of an array that `records` has made, by its numba dtype; None of any other."""
    return format_named(next(iter(dtype.fields)), dtype.size) if isinstance(dtype, Record) else None


def converts_halves() -> bool:
    """Whether the processor converts fp16."""
    return "+f16c" in processor_features()


def each(number: int, kind: Any = INTS) -> Any:
    """A vector of a number."""
    return ir.Constant(kind, [number] * kind.count)


def each_float(number: float) -> Any:
    return ir.Constant(VECTOR, [float(number)] * LANES)


def shuffled(builder: Any, first: Any, second: Any, lanes: Any) -> Any:
    """The lanes of these numbers of two vectors, the second's after the first's."""
    lanes = list(lanes)
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def splat(builder: Any, scalar: Any, count: int = LANES) -> Any:
    """A scalar in every lane."""
    kind = ir.VectorType(scalar.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return shuffled(builder, one, one, [0] * count)


class Unit(NamedTuple):
    """Some groups of a row: a block, or a group of a row of int8."""

    row: Any  # their addresses
    address: Any


class Group(NamedTuple):
    """A group's w = scale * (q - 2^zero_bits), or scale * q + minimum."""

    q: Any  # BYTES, unsigned
    scale: Any  # VECTOR
    minimum: Any  # VECTOR or None


class Blocks:
    """Reads the weights of a format.

    Args:
        args: of the intrinsic that reads them.
        form: the format.
    """

    def __init__(self, args: Arguments, form: Format) -> None:
        self._args, self._builder, self.form = args, args.builder, form
        # What is unrolled: the groups of a block or, of rows of int8, one group.
        self.groups, self.bytes = (1, COLUMNS) if form.is_row else (form.columns // COLUMNS, form.bytes)
        self.bits = 8 if form.is_row else int(form.name[1])  # of q
        self.zero_bits = self.bits - 1 if form.layout in ("Q4_0", "Q5_0", "Q6_K", "Q8_0", INT8) else None
        self._has_highest = form.layout in ("Q5_0", "Q5_1", "Q5_K")

    def row(self, weight: Any, index: Any, blocks: Any) -> Any:
        """The address of a row of an array of records."""
        builder = self._builder
        stride = builder.mul(blocks, I64(self.form.bytes))
        return builder.gep(builder.bitcast(weight, I8.as_pointer()), [builder.mul(index, stride)])

    def units(self, blocks: Any) -> Any:
        """How many times `groups` groups a row of so many blocks has."""
        return I64(self.form.columns // COLUMNS) if self.form.is_row else blocks

    def unit(self, row: Any, index: Any) -> Unit:
        """A row's unit of a number."""
        return Unit(row, self._at(row, self._builder.mul(index, I64(self.bytes))))

    def group(self, unit: Unit, number: int) -> Group:
        """A unit's group of a number."""
        if self.form.is_row:
            scale = splat(self._builder, self._load(unit.row, 0, _FLOAT))
            return Group(self._load(unit.address, SCALE_BYTES, BYTES), scale, None)
        return _GROUPS[self.form.layout](self, unit.address, number)

    def values(self, group: Group, vector: int) -> Any:
        """LANES weights as fp32: the vector of this number of a group's COLUMNS, by column."""
        builder = self._builder
        lanes = builder.bitcast(group.q, INTS)
        # Column 32 * (l % 2) + 4 * (l // 2) + j has number 4 * l + j.
        lane = 8 * (vector % 2) + vector // 2
        four = shuffled(builder, lanes, lanes, range(lane, lane + 8, 2))
        q = builder.zext(builder.bitcast(four, _LANE_BYTES), INTS)
        if self.zero_bits is not None:
            q = builder.sub(q, each(1 << self.zero_bits))
        numbers, scale = builder.sitofp(q, VECTOR), self._lane(group.scale, lane)
        if group.minimum is None:
            return builder.fmul(numbers, scale)
        return builder.call(self._args.fma, [numbers, scale, self._lane(group.minimum, lane)])

    def _lane(self, vector: Any, lane: int) -> Any:
        return shuffled(self._builder, vector, vector, [lane] * LANES)

    # What follows reads one block.

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
        magnitude = builder.shl(builder.and_(bits, number(0x7FFF)), number(13))  # 2^-112 of it, subnormal numbers too
        sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
        rest = ir.Constant(kind, 2.0**112) if kind == _FLOAT else each_float(2.0**112)
        return builder.fmul(builder.bitcast(builder.or_(magnitude, sign), kind), rest)

    def _half(self, block: Any, offset: int) -> Any:
        """An fp16 as fp32."""
        return self._widened(self._load(block, offset, I16), _FLOAT)

    def _halves(self, block: Any, offset: int) -> Any:
        """Two of them in turn, as fp32."""
        builder = self._builder
        pairs = splat(builder, self._load(block, offset, I32), LANES // 2)
        return self._widened(builder.bitcast(pairs, ir.VectorType(I16, LANES)), VECTOR)

    def _nibbles(self, block: Any, offset: int) -> Any:
        """The lower halves of 32 bytes, then their upper halves."""
        builder, words = self._builder, ir.VectorType(I16, COLUMNS // 2)
        once = self._load(block, offset, ir.VectorType(I16, LANES))
        twice = shuffled(builder, once, once, [*range(LANES), *range(LANES)])
        shifted = builder.lshr(twice, ir.Constant(words, [0] * LANES + [4] * LANES))
        return builder.and_(builder.bitcast(shifted, BYTES), each(15, BYTES))

    def _with_highest(self, block: Any, offset: int, q: Any) -> Any:
        builder = self._builder
        bits = builder.bitcast(self._load(block, offset, I64), ir.VectorType(ir.IntType(1), COLUMNS))
        return builder.select(bits, builder.add(q, each(16, BYTES)), q)

    # The formats.

    def _of_32(self, block: Any, number: int) -> Group:
        """Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0."""
        scale = self._halves(block, 0)
        if self.form.layout == "Q8_0":
            return Group(self._load(block, 4, BYTES), scale, None)
        has_minimum = self.form.layout.endswith("_1")
        q = self._nibbles(block, self.form.bytes - COLUMNS // 2)
        if self._has_highest:
            q = self._with_highest(block, 8 if has_minimum else 4, q)
        return Group(q, scale, self._halves(block, 4) if has_minimum else None)

    def _k(self, block: Any, number: int) -> Group:
        """Q4_K and Q5_K."""
        builder = self._builder
        small = builder.sitofp(builder.zext(self._load(block, 4, _LANE_BYTES), INTS), VECTOR)  # s, then t
        d, e = splat(builder, self._half(block, 0)), splat(builder, builder.fneg(self._half(block, 2)))
        scaled = builder.fmul(small, shuffled(builder, d, e, [*range(8), *[LANES] * 8]))
        scale, minimum = (
            shuffled(builder, scaled, scaled, [first + 2 * number + lane % 2 for lane in range(LANES)])
            for first in (0, 8)
        )
        q = self._nibbles(block, self.form.bytes - 128 + COLUMNS // 2 * number)
        return Group(self._with_highest(block, 20 + 8 * number, q) if self._has_highest else q, scale, minimum)

    def _q6_k(self, block: Any, number: int) -> Group:
        builder = self._builder
        small = builder.sitofp(builder.sext(self._load(block, 2, _LANE_BYTES), INTS), VECTOR)
        scaled = builder.fmul(small, splat(builder, self._half(block, 0)))
        lanes = [4 * number + 2 * (lane % 2) + lane // 8 for lane in range(LANES)]
        start = 18 + 48 * number
        pairs = self._load(block, start + 32, ir.VectorType(I32, 4))
        pairs = shuffled(builder, pairs, pairs, [*range(4)] * 4)
        left, right = ([4] * 4 + [2] * 4 + [0] * 8, [0] * 12 + [2] * 4)  # to bits 4 and 5
        shifted = builder.lshr(builder.shl(pairs, ir.Constant(INTS, left)), ir.Constant(INTS, right))
        high = builder.and_(builder.bitcast(shifted, BYTES), each(0x30, BYTES))
        return Group(builder.or_(self._nibbles(block, start), high), shuffled(builder, scaled, scaled, lanes), None)


_GROUPS: dict[str, Callable[[Blocks, Any, int], Group]] = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"), Blocks._of_32),
    **dict.fromkeys(("Q4_K", "Q5_K"), Blocks._k),
    "Q6_K": Blocks._q6_k,
}


@intrinsic
def dequantize_row(typing_context, out, place, weight, index):
    """out[place] = the values of weight[index], for out [rows, columns] fp32 and an array of records."""

    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out place weight index")
        out, columns, _ = args.array("out")
        weight, blocks, dtype = args.array("weight")
        form = format_of(dtype)
        assert form is not None, "an array of records"
        reader = Blocks(args, form)
        row = reader.row(weight, args.index("index"), blocks)
        out_row = builder.gep(out, [builder.mul(args.index("place"), columns)])

        def one_unit(index, none):
            unit, first = reader.unit(row, index), builder.mul(index, I64(reader.groups * COLUMNS))
            for number in range(reader.groups):
                group = reader.group(unit, number)
                for vector in range(COLUMNS // LANES):
                    at = builder.gep(out_row, [builder.add(first, I64(number * COLUMNS + vector * LANES))])
                    builder.store(reader.values(group, vector), builder.bitcast(at, VECTOR.as_pointer()), align=4)
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
    """Row `index` of a matrix [outputs, columns]: of an array of records its values, fp32."""


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

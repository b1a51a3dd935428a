"""Matrices in blocks (block_formats.py) as arrays of records, and how their values come out in registers.

A dot product multiplies the values that the blocks stand for, in the order of fp32 weights: it has the bits that the
compiled fp32 kernels have on the dequantised matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import overload

from runtime.kernels.cpu.block_formats import COLUMNS, INT8, SCALE_BYTES, Format, Part, format_named
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.vectors import I8, I16, I32, I64, INTS, LANES, VECTOR, Arguments, intrinsic, loop

_BYTES, _MASK = ir.VectorType(I8, LANES), ir.VectorType(ir.IntType(1), LANES)
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()


def records(part: Part) -> np.ndarray:
    """A part as an array [rows, blocks], whose dtype tells compiled kernels its format."""
    block = np.dtype([(part.format.name, np.uint8, part.format.bytes)])
    array: np.ndarray = part.data.numpy().view(block)
    return array


def format_of(dtype: Any) -> Format | None:
    """The format of an array that `records` has made, by its numba dtype; None of any other."""
    return format_named(next(iter(dtype.fields)), dtype.size) if isinstance(dtype, types.Record) else None


@functools.cache
def _features() -> frozenset[str]:
    """Of the processor that numba compiles for."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(features.split(","))


def converts_halves() -> bool:
    """Whether the processor converts fp16."""
    return "+f16c" in _features()


def permutes() -> bool:
    """Whether the processor looks LANES numbers up among as many at once."""
    return "+avx512f" in _features()


class Blocks:
    """Reads the weights of a format.

    Args:
        args: of the intrinsic that reads them.
        form: the format.
    """

    def __init__(self, args: Arguments, form: Format) -> None:
        self._args, self._builder, self._form = args, args.builder, form
        if permutes():
            self._permute = args.function("llvm.x86.avx512.permvar.sf.512", VECTOR, VECTOR, INTS)
        self._columns_bits = I64(form.columns.bit_length() - 1)

    def row(self, weight: Any, index: Any, blocks: Any) -> Any:
        """The address of a row of an array of records."""
        builder = self._builder
        stride = builder.mul(blocks, I64(self._form.bytes))
        return builder.gep(builder.bitcast(weight, I8.as_pointer()), [builder.mul(index, stride)])

    def block(self, row: Any, column: Any) -> Any:
        """The address of the block that holds a column, the first of COLUMNS."""
        if self._form.is_row:
            return row
        return self._at(row, self._builder.mul(self._builder.lshr(column, self._columns_bits), I64(self._form.bytes)))

    def group(self, row: Any, column: Any, vector: int) -> Any:
        """About where a vector's weights are, for prefetches."""
        if self._form.is_row:
            return self._at(row, self._builder.add(column, I64(SCALE_BYTES + vector * LANES)))
        within = self._builder.and_(column, I64(self._form.columns - 1))
        bytes_ = self._builder.lshr(self._builder.mul(within, I64(self._form.bytes)), self._columns_bits)
        return self._at(
            self.block(row, column),
            self._builder.add(bytes_, I64(vector * LANES * self._form.bytes // self._form.columns)),
        )

    def values(self, row: Any, column: Any, vector: int) -> Any:
        """LANES weights as fp32: the vector of this number of the COLUMNS from `column` on, a multiple of COLUMNS."""
        return _VALUES[self._form.name](self, self.block(row, column), column, vector)

    # What follows reads one block. An offset is a number, or an address's distance from the block.

    def _at(self, address: Any, offset: Any) -> Any:
        return self._builder.gep(address, [I64(offset) if isinstance(offset, int) else offset])

    def _ints(self, address: Any, offset: Any) -> Any:
        """LANES bytes, [lane] i32, from 0 to 255."""
        return self._builder.zext(self._load(self._at(address, offset), _BYTES), INTS)

    def _load(self, address: Any, kind: Any) -> Any:
        return self._builder.load(self._builder.bitcast(address, kind.as_pointer()), align=1)

    def _half(self, address: Any, offset: int) -> Any:
        """An fp16 as fp32."""
        builder, at = self._builder, self._at(address, offset)
        if converts_halves():
            return builder.fpext(self._load(at, _HALF), _FLOAT)
        bits = builder.zext(self._load(at, I16), I32)
        magnitude = builder.shl(builder.and_(bits, I32(0x7FFF)), I32(13))  # 2^-112 of it, subnormal numbers too
        sign = builder.shl(builder.and_(bits, I32(0x8000)), I32(16))
        value = builder.bitcast(builder.or_(magnitude, sign), _FLOAT)
        return builder.fmul(value, ir.Constant(_FLOAT, 2.0**112))

    def _byte(self, address: Any, offset: Any, is_signed: bool = False) -> Any:
        """A byte as fp32."""
        byte = self._load(self._at(address, offset), I8)
        extended = self._builder.sext(byte, I32) if is_signed else self._builder.zext(byte, I32)
        return self._builder.sitofp(extended, _FLOAT)

    def _all(self, scalar: Any) -> Any:
        """A scalar in every lane."""
        kind = ir.VectorType(scalar.type, LANES)
        one = self._builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self._builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * LANES))

    # The formats. Those of 32 columns have two blocks in COLUMNS.

    def _q8_0(self, block: Any, column: Any, vector: int) -> Any:
        block, upper = self._at(block, vector // 2 * self._form.bytes), vector % 2
        q = self._builder.sext(self._load(self._at(block, 2 + LANES * upper), _BYTES), INTS)
        return self._builder.fmul(self._builder.sitofp(q, VECTOR), self._all(self._half(block, 0)))

    def _int8(self, block: Any, column: Any, vector: int) -> Any:
        at = self._builder.add(column, I64(SCALE_BYTES + vector * LANES))
        q = self._builder.sext(self._load(self._at(block, at), _BYTES), INTS)
        return self._builder.fmul(self._builder.sitofp(q, VECTOR), self._all(self._load(block, _FLOAT)))

    def _q4(self, block: Any, column: Any, vector: int) -> Any:
        """Q4_0, Q4_1, Q5_0 and Q5_1."""
        has_minimum, has_fifth = self._form.name.endswith("_1"), self._form.name.startswith("Q5")
        block, upper = self._at(block, vector // 2 * self._form.bytes), vector % 2
        fifth = None
        if has_fifth:
            bits = self._load(self._at(block, (4 if has_minimum else 2) + 2 * upper), I16)
            fifth = self._builder.bitcast(bits, _MASK)
        bytes_ = self._ints(block, self._form.bytes - LANES)
        offset = self._half(block, 2) if has_minimum else 16 if has_fifth else 8
        return self._of_nibbles(bytes_, bool(upper), fifth, self._half(block, 0), offset)

    def _q4_k(self, block: Any, column: Any, vector: int) -> Any:
        """Q4_K and Q5_K."""
        builder = self._builder
        quarter = builder.and_(builder.lshr(column, I64(6)), I64(3))  # which of the block's four times COLUMNS
        of_32 = builder.add(builder.shl(quarter, I64(1)), I64(vector // 2))
        has_fifth, lanes = self._form.name == "Q5_K", LANES * (vector % 2)
        fifth = None
        if has_fifth:
            mask = self._all(builder.shl(I32(1), builder.trunc(of_32, I32)))
            fifth = builder.icmp_unsigned("!=", builder.and_(self._ints(block, 20 + lanes), mask), _each(0))
        start = 20 + (32 if has_fifth else 0) + lanes
        bytes_ = self._ints(block, builder.add(builder.shl(quarter, I64(5)), I64(start)))
        scale = builder.fmul(self._half(block, 0), self._byte(block, builder.add(of_32, I64(4))))
        minimum = builder.fmul(self._half(block, 2), self._byte(block, builder.add(of_32, I64(12))))
        return self._of_nibbles(bytes_, vector >= 2, fifth, scale, builder.fneg(minimum))

    def _of_nibbles(self, bytes_: Any, is_upper: bool, fifth: Any, scale: Any, offset: Any) -> Any:
        """scale * q + offset, or scale * (q - offset) where that is a number: q is a nibble of each byte, and 16 more
        where `fifth` [lane] i1 is given and set."""
        if is_upper:
            bytes_ = self._builder.lshr(bytes_, _each(4))
        if not permutes():
            q = self._builder.and_(bytes_, _each(15))
            if fifth is not None:
                q = self._builder.or_(q, self._builder.select(fifth, _each(16), _each(0)))
            return self._scaled(self._builder.sitofp(self._minus(q, offset), VECTOR), scale, offset)
        # Scaling the 16 values that there are, of which a permutation by the lower four bits picks each lane's.
        found = [
            self._builder.call(self._permute, [self._table(first, scale, offset), bytes_])
            for first in ((0,) if fifth is None else (0, 16))
        ]
        return found[0] if fifth is None else self._builder.select(fifth, found[1], found[0])

    def _minus(self, q: Any, offset: Any) -> Any:
        return self._builder.sub(q, _each(offset)) if isinstance(offset, int) else q

    def _table(self, first: int, scale: Any, offset: Any) -> Any:
        zero = offset if isinstance(offset, int) else 0
        numbers = ir.Constant(VECTOR, [float(first + nibble - zero) for nibble in range(16)])
        return self._scaled(numbers, scale, offset)

    def _scaled(self, numbers: Any, scale: Any, offset: Any) -> Any:
        if isinstance(offset, int):
            return self._builder.fmul(numbers, self._all(scale))
        return self._builder.call(self._args.fma, [numbers, self._all(scale), self._all(offset)])

    def _q6_k(self, block: Any, column: Any, vector: int) -> Any:
        builder = self._builder
        half = builder.and_(builder.lshr(column, I64(7)), I64(1))
        is_upper = builder.and_(builder.lshr(column, I64(6)), I64(1))  # of both nibbles, and of four pairs of bits
        low_at = builder.add(builder.shl(half, I64(6)), I64(LANES * vector))
        high_at = builder.add(builder.shl(half, I64(5)), I64(128 + LANES * (vector % 2)))
        shift = builder.trunc(builder.shl(is_upper, I64(2)), I32)
        low = builder.and_(builder.lshr(self._ints(block, low_at), self._all(shift)), _each(15))
        pair = builder.add(shift, I32(vector // 2 * 2))
        high = builder.and_(builder.lshr(self._ints(block, high_at), self._all(pair)), _each(3))
        q = builder.sub(builder.or_(low, builder.shl(high, _each(4))), _each(32))
        group = builder.add(builder.add(builder.shl(half, I64(3)), builder.shl(is_upper, I64(2))), I64(192 + vector))
        scale = builder.fmul(self._half(block, 208), self._byte(block, group, is_signed=True))
        return builder.fmul(builder.sitofp(q, VECTOR), self._all(scale))


def _each(number: int) -> Any:
    return ir.Constant(INTS, [number] * LANES)


_VALUES: dict[str, Callable[[Blocks, Any, Any, int], Any]] = {
    "Q8_0": Blocks._q8_0,
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1"), Blocks._q4),
    **dict.fromkeys(("Q4_K", "Q5_K"), Blocks._q4_k),
    "Q6_K": Blocks._q6_k,
    INT8: Blocks._int8,
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

        def one_group(column, none):
            for vector in range(COLUMNS // LANES):
                at = builder.gep(out_row, [builder.add(column, I64(vector * LANES))])
                builder.store(reader.values(row, column, vector), builder.bitcast(at, VECTOR.as_pointer()), align=4)
            return none

        loop(builder, columns, COLUMNS, [], one_group)
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

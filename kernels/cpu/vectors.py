"""The inner loops over weights and values, as LLVM intrinsics: wide vectors, bf16 widened in registers, prefetches.

Decoding reads each weight once, so a core needs enough reads in flight to use its share of the memory bandwidth. A
plain loop compiled by numba reaches two thirds of their bandwidth. torch.compile decodes a third as fast (19 tokens/s
against 57, the demo in bf16, bench/results/compare-cpu-bfloat16-all.json) and needs a C++ compiler wherever it runs.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.core.registry import cpu_target

intrinsic: Any = extending.intrinsic  # its annotation demands the typing context, which callers leave out

LANES, VECTORS = 16, 4
BLOCK = LANES * VECTORS
CACHE_LINE = 64  # bytes
KEYS_AHEAD = 16  # prefetch distance of cached values, in keys, into L2
L1, L2 = 3, 2  # LLVM's localities

I64, I32, I16, I8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))
VECTOR = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(I32, LANES)


@functools.cache
def processor_features() -> frozenset[str]:
    """The features of the processor that numba compiles for."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(features.split(","))


class BFloat(ir.Type):
    """LLVM's bf16, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def each(number: int, kind: Any = INTS) -> Any:
    """A vector with a number in every lane."""
    return ir.Constant(kind, [number] * kind.count)


def each_float(number: float, kind: Any = VECTOR) -> Any:
    return ir.Constant(kind, [float(number)] * kind.count)


def shuffled(builder: Any, first: Any, second: Any, lanes: Any) -> Any:
    """The lanes with these numbers of two vectors, the second's counted after the first's."""
    lanes = list(lanes)
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def splat(builder: Any, scalar: Any, count: int = LANES) -> Any:
    """A scalar in every lane."""
    kind = ir.VectorType(scalar.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return shuffled(builder, one, one, [0] * count)


def load(builder: Any, row: Any, column: Any, dtype: Any) -> Any:
    """LANES elements of a row as fp32."""
    address = builder.gep(row, [column])
    if dtype == types.float32:
        return builder.load(builder.bitcast(address, VECTOR.as_pointer()), align=4)
    packed = builder.load(builder.bitcast(address, ir.VectorType(I16, LANES).as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(packed, INTS), each(16)), VECTOR)


def starts_cache_line(vector: int, dtype: Any) -> bool:
    """Whether a block's vector of this number begins a cache line, if the block does."""
    return vector * LANES * dtype.bitwidth // 8 % CACHE_LINE == 0


def sum_of_lanes(builder: Any, vector: Any) -> Any:
    """Adds the upper half of the lanes to the lower half until one lane is left."""
    width = LANES
    while width > 1:
        width //= 2
        lower, upper = (shuffled(builder, vector, vector, lanes) for lanes in (range(width), range(width, 2 * width)))
        vector = builder.fadd(lower, upper)
    return builder.extract_element(vector, I32(0))


class Arguments:
    """An intrinsic's arguments by name, and the LLVM functions that it calls."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, names: str) -> None:
        self._context, self.builder = context, builder
        self._types = dict(zip(names.split(), signature.args, strict=True))
        self._values = dict(zip(names.split(), arguments, strict=True))
        self.fma = self.function(f"llvm.fma.v{LANES}f32", VECTOR, VECTOR, VECTOR, VECTOR)
        self._llvm_prefetch = self.function("llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)

    def function(self, name: str, result: Any, *takes: Any) -> Any:
        """An LLVM function by name."""
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, takes), name)

    def array(self, name: str) -> tuple[Any, Any, Any]:
        """(address, row length, dtype) of a contiguous array [rows, columns]."""
        kind = self._types[name]
        array = self._context.make_array(kind)(self._context, self.builder, self._values[name])
        return array.data, cgutils.unpack_tuple(self.builder, array.shape)[1], kind.dtype

    def index(self, name: str) -> Any:
        return self._context.cast(self.builder, self._values[name], self._types[name], types.intp)

    def literal(self, name: str) -> int:
        return self._types[name].literal_value

    def prefetch(self, address: Any, ahead: Any, level: int) -> None:
        """Prefetches the cache line `ahead` bytes beyond an address."""
        at = self.builder.gep(self.builder.bitcast(address, I8.as_pointer()), [ahead])
        self.builder.call(self._llvm_prefetch, [at, I32(0), I32(level), I32(1)])


def loop(builder: Any, last: Any, step: int, sums: list[Any], body: Any) -> list[Any]:
    """for index in range(0, last, step): sums = body(index, sums), with the sums in vector registers."""
    entry = builder.block
    head, inside, end = (builder.append_basic_block(name) for name in ("loop", "loop.body", "loop.end"))
    builder.branch(head)
    builder.position_at_end(head)
    index, phis = builder.phi(I64), [builder.phi(total.type) for total in sums]
    builder.cbranch(builder.icmp_signed("<", index, last), inside, end)
    builder.position_at_end(inside)
    updated = body(index, phis)
    index.add_incoming(I64(0), entry)
    index.add_incoming(builder.add(index, I64(step)), builder.block)
    for phi, before, after in zip(phis, sums, updated, strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(after, builder.block)
    builder.branch(head)
    builder.position_at_end(end)
    return phis


@intrinsic(prefer_literal=True)
def accumulate_values(typing_context, out, weights, start, values, slot, count, dim, first, rows):
    """out[first + r, dim : dim + BLOCK] += the sum over i < count, in order, of weights[first + r, start + i] *
    values[slot + i, dim : dim + BLOCK], for r < rows. `rows` is a literal; the values are read once for all rows."""

    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out weights start values slot count dim first rows")
        (out, head_dim, _), (weights, keys, _) = args.array("out"), args.array("weights")
        values, _, value_type = args.array("values")
        row_ids = [builder.add(args.index("first"), I64(row)) for row in range(args.literal("rows"))]
        start, slot, dim = args.index("start"), args.index("slot"), args.index("dim")
        weight_rows = [builder.gep(weights, [builder.add(builder.mul(row, keys), start)]) for row in row_ids]
        value_row = builder.gep(values, [builder.add(builder.mul(slot, head_dim), dim)])
        places = [
            builder.bitcast(builder.gep(out, [builder.add(builder.mul(row, head_dim), column)]), VECTOR.as_pointer())
            for row in row_ids
            for column in [builder.add(dim, I64(vector * LANES)) for vector in range(VECTORS)]
        ]
        ahead = builder.mul(head_dim, I64(KEYS_AHEAD * value_type.bitwidth // 8))

        def one_key(key, sums):
            row_start = builder.mul(key, head_dim)
            loaded, updated = [], []
            for vector in range(VECTORS):
                at = builder.add(row_start, I64(vector * LANES))
                if starts_cache_line(vector, value_type):
                    args.prefetch(builder.gep(value_row, [at]), ahead, L2)
                loaded.append(load(builder, value_row, at, value_type))
            for row, weight_row in enumerate(weight_rows):
                weight = splat(builder, builder.load(builder.gep(weight_row, [key])))
                for vector in range(VECTORS):
                    updated.append(builder.call(args.fma, [loaded[vector], weight, sums[row * VECTORS + vector]]))
            return updated

        before = [builder.load(place, align=4) for place in places]
        sums = loop(builder, args.index("count"), 1, before, one_key)
        for place, total in zip(places, sums, strict=True):
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(out, weights, start, values, slot, count, dim, first, rows), generate

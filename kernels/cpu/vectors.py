"""LLVM building blocks: the inner loops over weights and values, in wide vectors.

Decoding reads each weight once, and a core must keep enough reads under way to get its share of the memory's bandwidth.
`_sums` is therefore written in LLVM's own terms: wide vectors, bf16 widened in registers, reads ahead of their use. A
plain loop compiled by numba reaches two thirds of that. torch.compile, the other candidate, decodes a third as fast (19
tokens/s to 57, the demo in bf16, bench/results/compare-cpu-bfloat16-all.json) and needs a C++ compiler on every machine
that runs it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic  # its annotation keeps the argument that callers leave out

LANES, VECTORS = 16, 4
BLOCK = LANES * VECTORS
LINE = 64  # bytes
# How many bytes of a weight matrix are read before their turn: into the second-level cache from just over a page away,
# where the processor's own reading ahead ends, and from there into the first. A step of the demo on the machine of the
# README takes 7 to 15 % longer without the former, 7 % without the latter and 26 to 34 % without both; half or twice as
# far away, 3 to 8 %.
FAR_AHEAD, NEAR_AHEAD = 4096 + 128, 512
KEYS_AHEAD = 16  # keys whose values are read before their turn, into the second-level cache
FIRST_LEVEL, SECOND_LEVEL = 3, 2  # what LLVM calls locality

_FLOAT, _INDEX, _INT, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)


def _load(builder: Any, row: Any, column: Any, dtype: Any) -> Any:
    """LANES elements of a row as fp32."""
    address = builder.gep(row, [column])
    if dtype == types.float32:
        return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)
    packed = builder.load(builder.bitcast(address, ir.VectorType(ir.IntType(16), LANES).as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(packed, _INTS), ir.Constant(_INTS, [16] * LANES)), _VECTOR)


def _starts_line(vector: int, dtype: Any) -> bool:
    """Whether the elements that are the vector of this number in a block are the first ones of a line of the cache."""
    return vector * LANES * dtype.bitwidth // 8 % LINE == 0


def _sum_of_lanes(builder: Any, vector: Any) -> Any:
    """The upper half of the lanes is added to the lower one until a single lane is left."""
    width = LANES
    while width > 1:
        width //= 2
        lower, upper = (
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_INT, width), list(lanes)))
            for lanes in (range(width), range(width, 2 * width))
        )
        vector = builder.fadd(lower, upper)
    return builder.extract_element(vector, _INT(0))


class _Parts:
    """What an intrinsic's generator starts from: its array arguments by name, integers as the processor's own, and
    LLVM's functions."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, names: str) -> None:
        self._context, self._builder = context, builder
        self._types = dict(zip(names.split(), signature.args, strict=True))
        self._values = dict(zip(names.split(), arguments, strict=True))
        self.fma = self._function(f"llvm.fma.v{LANES}f32", _VECTOR, _VECTOR, _VECTOR, _VECTOR)
        self._prefetch = self._function("llvm.prefetch.p0", ir.VoidType(), _BYTE.as_pointer(), _INT, _INT, _INT)

    def _function(self, name: str, result: Any, *takes: Any) -> Any:
        return cgutils.get_or_insert_function(self._builder.module, ir.FunctionType(result, takes), name)

    def array(self, name: str) -> tuple[Any, Any, Any]:
        """(address of the first element, length of a row, dtype) of a contiguous [rows, columns]."""
        kind = self._types[name]
        array = self._context.make_array(kind)(self._context, self._builder, self._values[name])
        return array.data, cgutils.unpack_tuple(self._builder, array.shape)[1], kind.dtype

    def index(self, name: str) -> Any:
        return self._context.cast(self._builder, self._values[name], self._types[name], types.intp)

    def literal(self, name: str) -> int:
        return self._types[name].literal_value

    def read_ahead(self, address: Any, ahead: Any, level: int) -> None:
        """Starts reading what lies `ahead` bytes beyond an address into a cache."""
        at = self._builder.gep(self._builder.bitcast(address, _BYTE.as_pointer()), [ahead])
        self._builder.call(self._prefetch, [at, _INT(0), _INT(level), _INT(1)])


def _counted(builder: Any, last: Any, step: int, sums: list[Any], body: Any) -> list[Any]:
    """for index in range(0, last, step): sums = body(index, sums), the sums being vectors kept in registers."""
    entry = builder.block
    head, inside, end = (builder.append_basic_block(name) for name in ("loop", "loop.body", "loop.end"))
    builder.branch(head)
    builder.position_at_end(head)
    index, phis = builder.phi(_INDEX), [builder.phi(_VECTOR) for _ in sums]
    builder.cbranch(builder.icmp_signed("<", index, last), inside, end)
    builder.position_at_end(inside)
    raised = body(index, phis)
    index.add_incoming(_INDEX(0), entry)
    index.add_incoming(builder.add(index, _INDEX(step)), builder.block)
    for phi, before, after in zip(phis, sums, raised, strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(after, builder.block)
    builder.branch(head)
    builder.position_at_end(end)
    return phis


@intrinsic(prefer_literal=True)
def _sums(typing_context, out, place, weight, index, x, first, rows):
    """out[place, first + r] = the product of weight[index] and x[first + r] for r < rows, over the columns that fill
    whole blocks. `rows` is a literal; the weights are read once for all of them."""
    signature = types.void(out, place, weight, index, x, first, rows)

    def generate(context, builder, signature, arguments):
        parts = _Parts(context, builder, signature, arguments, "out place weight index x first rows")
        (out, all_rows, _), (x, columns, x_type) = parts.array("out"), parts.array("x")
        weight, _, weight_type = parts.array("weight")
        weight_row = builder.gep(weight, [builder.mul(parts.index("index"), columns)])
        numbers = [builder.add(parts.index("first"), _INDEX(row)) for row in range(parts.literal("rows"))]
        x_rows = [builder.gep(x, [builder.mul(number, columns)]) for number in numbers]
        out_row = builder.gep(out, [builder.mul(parts.index("place"), all_rows)])

        def one_block(column, sums):
            raised = []
            for vector in range(VECTORS):
                at = builder.add(column, _INDEX(vector * LANES))
                if _starts_line(vector, weight_type):  # line by line: fp32 read a block at a time comes a tenth slower
                    here = builder.gep(weight_row, [at])
                    parts.read_ahead(here, _INDEX(FAR_AHEAD), SECOND_LEVEL)
                    parts.read_ahead(here, _INDEX(NEAR_AHEAD), FIRST_LEVEL)
                loaded = _load(builder, weight_row, at, weight_type)
                for row, x_row in enumerate(x_rows):
                    activation = _load(builder, x_row, at, x_type)
                    raised.append(builder.call(parts.fma, [loaded, activation, sums[vector * len(x_rows) + row]]))
            return raised

        whole = builder.mul(builder.sdiv(columns, _INDEX(BLOCK)), _INDEX(BLOCK))
        zeros = [ir.Constant(_VECTOR, [0.0] * LANES)] * (VECTORS * len(x_rows))
        sums = _counted(builder, whole, BLOCK, zeros, one_block)
        for row, number in enumerate(numbers):
            pairs = sums[row :: len(x_rows)]
            while len(pairs) > 1:
                pairs = [builder.fadd(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
            builder.store(_sum_of_lanes(builder, pairs[0]), builder.gep(out_row, [number]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def _mix(typing_context, out, weights, start, values, slot, count, dim, first, rows):
    """out[first + r, dim : dim + BLOCK] += the sum over i < count, in this order, of weights[first + r, start + i] *
    values[slot + i, dim : dim + BLOCK], for r < rows. `rows` is a literal; the values are read once for all of them."""
    signature = types.void(out, weights, start, values, slot, count, dim, first, rows)

    def generate(context, builder, signature, arguments):
        parts = _Parts(context, builder, signature, arguments, "out weights start values slot count dim first rows")
        (out, head_dim, _), (weights, keys, _) = parts.array("out"), parts.array("weights")
        values, _, value_type = parts.array("values")
        numbers = [builder.add(parts.index("first"), _INDEX(row)) for row in range(parts.literal("rows"))]
        weight_rows = [
            builder.gep(weights, [builder.add(builder.mul(number, keys), parts.index("start"))]) for number in numbers
        ]
        value_row = builder.gep(values, [builder.add(builder.mul(parts.index("slot"), head_dim), parts.index("dim"))])
        places = [
            builder.bitcast(
                builder.gep(out, [builder.add(builder.mul(number, head_dim), column)]), _VECTOR.as_pointer()
            )
            for number in numbers
            for column in [builder.add(parts.index("dim"), _INDEX(vector * LANES)) for vector in range(VECTORS)]
        ]
        ahead = builder.mul(head_dim, _INDEX(KEYS_AHEAD * value_type.bitwidth // 8))

        def one_key(key, sums):
            row_start = builder.mul(key, head_dim)
            loaded, raised = [], []
            for vector in range(VECTORS):
                at = builder.add(row_start, _INDEX(vector * LANES))
                if _starts_line(vector, value_type):
                    parts.read_ahead(builder.gep(value_row, [at]), ahead, SECOND_LEVEL)
                loaded.append(_load(builder, value_row, at, value_type))
            for row, weight_row in enumerate(weight_rows):
                one = builder.insert_element(
                    ir.Constant(_VECTOR, ir.Undefined), builder.load(builder.gep(weight_row, [key])), _INT(0)
                )
                weight = builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))
                for vector in range(VECTORS):
                    raised.append(builder.call(parts.fma, [loaded[vector], weight, sums[row * VECTORS + vector]]))
            return raised

        before = [builder.load(place, align=4) for place in places]
        sums = _counted(builder, parts.index("count"), 1, before, one_key)
        for place, total in zip(places, sums, strict=True):
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return signature, generate

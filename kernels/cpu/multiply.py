"""How weights of each dtype are multiplied into running sums, one vector of them at a time.

    fp32: a lane has one column,   sum = fma(w, x, sum)
    bf16: a lane has two columns,  sum = fma(w[2i], x[2i], fma(w[2i + 1], x[2i + 1], sum))

The second is what VDPBF16PS of AVX-512 computes in one instruction without widening anything; processors that lack it
get the same bits from two fused multiply-adds. (The instruction treats subnormal numbers as zeros, so sums may differ
below 1e-37.) bf16 activations are multiplied as they are, in halves of 32 bits, or widened once for all weights; fp32
activations, with bf16 weights that are passed as int16, always take the multiply-adds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import overload

from runtime.kernels.cpu.vectors import (
    BLOCK,
    I32,
    I64,
    L1,
    L2,
    LANES,
    VECTOR,
    Arguments,
    BFloat,
    each,
    each_float,
    intrinsic,
    loop,
    processor_features,
    sum_of_lanes,
)

# Prefetch distances in bytes of a weight matrix: into L2 from just over a page away, where the hardware prefetcher
# stops, and from there into L1. On an Intel Xeon with AMX a step of the demo takes 7 to 15 % longer without the former,
# 7 % without the latter, 26 to 34 % without both, and 3 to 8 % with half or twice the distance.
FAR_AHEAD, NEAR_AHEAD = 4096 + 128, 512


def multiplies_pairs() -> bool:
    """Whether the processor that numba compiles for multiplies pairs of bf16."""
    return "+avx512bf16" in processor_features()


class Fp32Products:
    """fp32 weights times fp32 activations.

    Args:
        args: of the intrinsic that multiplies.
        lanes: of its vectors.
    """

    lane_columns, parts = 1, 1  # a vector of weights, or of activations, is used in so many parts, in turn

    def __init__(self, args: Arguments, lanes: int = LANES) -> None:
        self._args, self._builder = args, args.builder
        self.sums = ir.VectorType(ir.FloatType(), lanes)
        self.columns = lanes * self.lane_columns  # of a vector
        self._fma = args.function(f"llvm.fma.v{lanes}f32", *[self.sums] * 4)

    def row(self, weight: Any, index: Any, length: Any) -> Any:
        """The address of a row of a matrix whose rows have this length."""
        return self._builder.gep(weight, [self._builder.mul(index, length)])

    def prefetch(self, row: Any, column: Any, vector: int, ahead: Any, level: int) -> None:
        """Prefetches the cache line of a vector of weights, `ahead` bytes beyond it."""
        self._args.prefetch(self._builder.gep(row, [self._at(column, vector)]), ahead, level)

    def weights(self, row: Any, column: Any, vector: int, part: int) -> Any:
        """A part of vector number `vector` of a row of weights, counted from a column."""
        return self._load(row, self._at(column, vector), self.sums, 4)

    def activations(self, row: Any, at: Any, part: int) -> Any:
        """A part of the vector of a row of activations that begins at a column."""
        return self._load(row, self._builder.add(at, I64(part * self.sums.count)), self.sums, 4)

    def add(self, total: Any, weights: Any, activations: Any) -> Any:
        """total + weights * activations, lane by lane, for one part of both."""
        return self._builder.call(self._fma, [weights, activations, total])

    def _at(self, column: Any, vector: int) -> Any:
        return self._builder.add(column, I64(vector * self.columns))

    def _load(self, row: Any, at: Any, kind: Any, align: int) -> Any:
        address = self._builder.bitcast(self._builder.gep(row, [at]), kind.as_pointer())
        return self._builder.load(address, align=align)


class PairProducts(Fp32Products):
    """bf16 weights times bf16 activations, a pair a lane, by VDPBF16PS."""

    lane_columns = 2

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self._pairs = ir.VectorType(BFloat(), self.columns)
        self._multiply = args.function("llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, VECTOR, self._pairs, self._pairs)

    def weights(self, row: Any, column: Any, vector: int, part: int) -> Any:
        return self._load(row, self._at(column, vector), self._pairs, 2)

    def activations(self, row: Any, at: Any, part: int) -> Any:
        return self._load(row, at, self._pairs, 2)

    def add(self, total: Any, weights: Any, activations: Any) -> Any:
        return self._builder.call(self._multiply, [total, weights, activations])


class WidenedPairProducts(Fp32Products):
    """The same sums from bf16 weights and activations in fp32, which `operand` has rearranged: the odd columns of a
    vector first, then the even ones."""

    lane_columns, parts = 2, 2

    def weights(self, row: Any, column: Any, vector: int, part: int) -> Any:
        builder, ints = self._builder, ir.VectorType(I32, self.sums.count)
        pairs = self._load(row, self._at(column, vector), ints, 2)
        widened = builder.shl(pairs, each(16, ints)) if part else builder.and_(pairs, each(0xFFFF0000, ints))
        return builder.bitcast(widened, self.sums)


def products_of(args: Arguments, weight_type: Any, lanes: int = LANES) -> Fp32Products:
    """How weights of a dtype are multiplied here, in vectors of so many lanes; LANES where pairs are multiplied."""
    if weight_type == types.float32:
        return Fp32Products(args, lanes)
    if weight_type == types.uint16 and multiplies_pairs():
        return PairProducts(args)
    return WidenedPairProducts(args, lanes)


def vector_columns(weight):
    """How many columns of `weight` a vector has."""


@overload(vector_columns, inline="always")
def _vector_columns(weight):
    columns = 2 * LANES if weight.dtype in (types.uint16, types.int16) else LANES
    return lambda weight: columns


@intrinsic(prefer_literal=True)
def dot_blocks(typing_context, out, place, weight, index, x, first, rows):
    """out[first + r, place] = the dot product of weight[index] and x[first + r] for r < rows, over the columns of whole
    blocks. `rows` is a literal, x an operand of the weights, which are read once for all rows."""

    def generate(context, builder, signature, arguments):
        args = Arguments(context, builder, signature, arguments, "out place weight index x first rows")
        (out, out_length, _), (x, columns, _) = args.array("out"), args.array("x")
        weight, length, weight_type = args.array("weight")
        products = products_of(args, weight_type)
        vectors = BLOCK // products.columns
        weight_row = products.row(weight, args.index("index"), length)
        row_ids = [builder.add(args.index("first"), I64(row)) for row in range(args.literal("rows"))]
        x_rows = [builder.gep(x, [builder.mul(row, columns)]) for row in row_ids]

        def one_block(column, sums):
            updated = []
            for vector in range(vectors):  # each a cache line of weights
                at = builder.add(column, I64(vector * products.columns))
                products.prefetch(weight_row, column, vector, I64(FAR_AHEAD), L2)
                products.prefetch(weight_row, column, vector, I64(NEAR_AHEAD), L1)
                totals = sums[vector * len(x_rows) : (vector + 1) * len(x_rows)]
                for part in range(products.parts):
                    loaded = products.weights(weight_row, column, vector, part)
                    totals = [
                        products.add(total, loaded, products.activations(x_row, at, part))
                        for total, x_row in zip(totals, x_rows, strict=True)
                    ]
                updated += totals
            return updated

        whole = builder.mul(builder.sdiv(columns, I64(BLOCK)), I64(BLOCK))
        zeros = [each_float(0)] * (vectors * len(x_rows))
        sums = loop(builder, whole, BLOCK, zeros, one_block)
        for row, row_id in enumerate(row_ids):
            pairs = sums[row :: len(x_rows)]
            while len(pairs) > 1:
                pairs = [builder.fadd(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
            at = builder.add(builder.mul(row_id, out_length), args.index("place"))
            builder.store(sum_of_lanes(builder, pairs[0]), builder.gep(out, [at]))
        return context.get_dummy_value()

    return types.void(out, place, weight, index, x, first, rows), generate

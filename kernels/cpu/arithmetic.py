"""Arithmetic of the compiled kernels: bf16 to fp32 and back, exp, dot products, RMS norm, the soft cap.

Formulas and roundings are those of each operation's own file in kernels/. The order of summation is not, and is fixed
here: a dot product is one running sum for each lane of a block's vectors (multiply.py), added pairwise at the end, for
any number of rows or threads and any vector width of the processor. So a row has the same bits alone, in a batch and
on every machine. bf16 is passed as uint16, since NumPy has no such dtype, and as int16 where it is multiplied by fp32.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.fixed_point import fixed_point
from runtime.kernels.cpu.multiply import dot_blocks, multiplies_pairs
from runtime.kernels.cpu.records import format_of
from runtime.kernels.cpu.vectors import BLOCK, LANES


def widen(value, array):
    """An element of an array as fp32."""


def narrow(value, array):
    """An fp32 value in an array's dtype, rounded to nearest even."""


@overload(widen, inline="always")
def _widen(value, array):
    if array.dtype == types.float32:
        return lambda value, array: value
    return lambda value, array: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


@overload(narrow, inline="always")
def _narrow(value, array):
    if array.dtype == types.float32:
        return lambda value, array: value

    def to_bfloat16(value, array):
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return to_bfloat16


@njit(inline="always")
def rounded(value, array):
    """An fp32 value rounded to an array's dtype, as fp32."""
    return widen(narrow(value, array), array)


LOG2_E, LN_2, LN_2_REST = (np.float32(value) for value in (1.44269504, 0.693359375, -2.12194440e-4))


@njit(inline="always")
def exp(x):
    """e^x in fp32 within one unit in the last place (Cephes' polynomial); 0 below -87.7, infinite above 88.4.

    LLVM vectorises it; math.exp would be a call per element.
    """
    x = min(max(x, np.float32(-88.0)), np.float32(89.0))
    power = np.floor(x * LOG2_E + np.float32(0.5))
    rest = x - power * LN_2 - power * LN_2_REST
    y = np.float32(1.9875691500e-4) * rest + np.float32(1.3981999507e-3)
    y = y * rest + np.float32(8.3334519073e-3)
    y = y * rest + np.float32(4.1665795894e-2)
    y = y * rest + np.float32(1.6666665459e-1)
    y = y * rest + np.float32(5.0000001201e-1)
    y = y * rest * rest + rest + np.float32(1.0)
    return y * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)


def operand(x, weight):
    """Activations [rows, columns] as products with `weight` take them: in the weights' dtype; in fp32, with the odd
    columns of a vector before the even ones in whole blocks, for int16 weights and, where the processor does not
    multiply pairs, for bf16 ones; in fixed point for a matrix in blocks of integers, whatever its format.

    x holds values of the weights' dtype, stored in that or in fp32; with int16 weights, any values of fp32.
    """


@overload(operand)
def _operand(x, weight):
    if format_of(weight.dtype):
        return lambda x, weight: fixed_point(x)
    is_bfloat16, is_mixed = weight.dtype == types.uint16, weight.dtype == types.int16
    if not (is_bfloat16 or is_mixed) or (weight.dtype == x.dtype and multiplies_pairs()):
        return lambda x, weight: x

    def narrowed(x, weight):
        out = np.empty(x.shape, np.uint16)
        for row in range(x.shape[0]):
            for column in range(x.shape[1]):
                out[row, column] = narrow(x[row, column], out)
        return out

    def widened(x, weight):
        out = np.empty(x.shape, np.float32)
        whole = x.shape[1] - x.shape[1] % BLOCK
        for row in range(x.shape[0]):
            for first in range(0, whole, 2 * LANES):
                for lane in range(LANES):
                    out[row, first + lane] = widen(x[row, first + 2 * lane + 1], x)
                    out[row, first + LANES + lane] = widen(x[row, first + 2 * lane], x)
            for column in range(whole, x.shape[1]):
                out[row, column] = widen(x[row, column], x)
        return out

    return narrowed if is_bfloat16 and multiplies_pairs() else widened


@compiled
def dot_products(sums, at, count, weight, first, x):
    """sums[r, at + i] = the dot product of weight[first + i] and x[r], in fp32, for i < count.

    sums [rows, at least at + count] is fp32, weight [outputs, columns] of the model's dtype, x [rows, columns] its
    operand.
    """
    rows, columns = x.shape
    whole = columns - columns % BLOCK
    for place in range(at, at + count):
        index, row = first + place - at, 0
        while rows - row >= 4:
            dot_blocks(sums, place, weight, index, x, row, 4)
            row += 4
        if rows - row >= 2:
            dot_blocks(sums, place, weight, index, x, row, 2)
            row += 2
        if rows > row:
            dot_blocks(sums, place, weight, index, x, row, 1)
    add_rest(sums, at, count, weight, first, x, whole)


@compiled
def add_rest(sums, at, count, weight, first, x, whole):
    """Adds to the sums of dot_products what the columns from `whole` on make."""
    rows, columns = x.shape
    if whole < columns:
        for place in range(count):
            for column in range(whole, columns):
                value = widen(weight[first + place, column], weight)
                for row in range(rows):
                    sums[row, at + place] += value * widen(x[row, column], x)


@compiled
def norm(out, x, weight, eps, like):
    """out = rms_norm(x) in fp32, rounded to the dtype of `like`; `weight` is of the model's dtype."""
    square, as_row = np.empty((1, 1), np.float32), x.reshape(1, len(x))
    dot_products(square, 0, 1, as_row, 0, as_row)
    inverse = np.float32(1.0) / np.float32(math.sqrt(square[0, 0] / np.float32(len(x)) + eps))
    for column in range(len(x)):
        out[column] = rounded(x[column] * inverse * (np.float32(1.0) + widen(weight[column], weight)), like)


@compiled
def as_fp32(x):
    """An array [rows, columns] as fp32."""
    out = np.empty(x.shape, np.float32)
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            out[row, column] = widen(x[row, column], x)
    return out


@njit(inline="always")
def capped(value, softcap, like):
    """softcap * tanh(value / softcap), rounded to the dtype of `like` after each operation."""
    value = rounded(value / softcap, like)
    value = rounded(np.float32(math.tanh(value)), like)
    return rounded(value * softcap, like)

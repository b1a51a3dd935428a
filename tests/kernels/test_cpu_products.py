"""The CPU's dot products: pairs of bf16 are summed in the order that the documentation gives, on every processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.kernels.cpu import calls as cpu_calls

MISSING = cpu_calls.missing(torch.bfloat16)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}")

LANES = 16


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def wide(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A product of two bf16 is exact in fp32, so it and the sum round once."""
    return a * b + c


def documented(weight: np.ndarray, x: np.ndarray) -> np.float32:
    """A dot product of bf16 as multiply.py gives it: two vectors of 16 lanes, a pair a lane, the odd column first."""
    sums = np.zeros((2, LANES), np.float32)
    for first in range(0, len(weight), 4 * LANES):
        for vector in range(2):
            pairs = slice(first + 2 * LANES * vector, first + 2 * LANES * (vector + 1))
            w, y = wide(weight[pairs]), wide(x[pairs])
            sums[vector] = fma(w[0::2], y[0::2], fma(w[1::2], y[1::2], sums[vector]))
    lanes = sums[0] + sums[1]
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


@pytest.mark.parametrize("rows", [*range(1, 14), 25])  # panels of every size, and pairs of them
def test_pairs_are_summed_in_the_documented_order(rows: int) -> None:
    from runtime.kernels.cpu.arithmetic import operand
    from runtime.kernels.cpu.cache import compiled
    from runtime.kernels.cpu.panels import panels_of, products

    @compiled
    def run(sums, weight, x):
        factors = operand(x, weight)
        products(sums, 1, len(weight), weight, 0, factors, panels_of(factors, weight))

    random = np.random.default_rng(rows)
    weight, x = (bfloat16(random.standard_normal((count, 192))) for count in (7, rows))
    sums = np.full((rows, 9), np.nan, np.float32)
    run(sums, weight, x)
    expected = [[documented(w, y) for w in weight] for y in x]
    assert (sums[:, 1:8] == np.array(expected)).all()
    assert np.isnan(sums[:, [0, 8]]).all()

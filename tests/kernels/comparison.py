"""How a kernel's result is held to its reference; test_planted_faults.py shows what these comparisons catch.

Tokens, positions and copies are compared exactly, where they are made.
"""

from __future__ import annotations

import torch

# What two correct computations may differ by: some units in the last place of the largest value, however small the
# error of the plain operation happens to be.
FLOOR_ULPS = 4
# How far from the plain operation a result with the same roundings may lie, of the plain operation's own distance from
# the truth. Sums in another order seldom move a value over the edge of a rounding, and the kernels come to 0.02, where
# attention has a cap to 0.35; a rounding too few or too many moves a fifth of all values, and comes to 0.6 and more.
SAME_ROUNDINGS = 0.5


def assert_as_exact(
    given: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, slack: float = 0.0, magnitude: float = 0.0
) -> None:
    """Asserts that the error of `given` against fp64 truth is at most twice that of the plain operation at the same
    dtype, plus a small floor and, as a part of the largest value, a slack. `magnitude` takes the largest value's place
    where what is added up is larger, as where it cancels."""
    truth = truth.double()
    largest = max(truth.abs().max().item(), magnitude)
    floor = (FLOOR_ULPS * torch.finfo(given.dtype).eps + slack) * largest
    bound = 2 * (plain.double() - truth).abs().max().item() + floor
    error = (given.double() - truth).abs().max().item()
    assert error <= bound, f"error {error:.3e} against fp64, the plain operation's is {(bound - floor) / 2:.3e}"


def rms(difference: torch.Tensor) -> float:
    return difference.double().pow(2).mean().sqrt().item()


def assert_same_roundings(
    given: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, bound: float = SAME_ROUNDINGS
) -> None:
    """Asserts that `given` rounds where the plain operation does, for dtypes of 16 bits: that it is much nearer to the
    plain result than that is to fp64 truth.

    In fp32 there is nothing to see: sums in another order differ by as much as a rounding.
    """
    assert given.dtype.itemsize == 2
    distance, error = rms(given.double() - plain.double()), rms(plain.double() - truth.double())
    assert distance <= bound * error, (
        f"{distance:.3e} from the plain operation, whose own error is {error:.3e}: a rounding too few or too many"
    )

"""How a kernel's result is held to its reference; tests/kernels/test_planted_faults.py shows what is caught.

Tokens, positions and copies are compared exactly, where they are made.
"""

from __future__ import annotations

import torch


class Mismatch(AssertionError):
    """A result that is not what it has to be."""


def require(condition: bool, message: str) -> None:
    """Raises Mismatch unless a condition holds; unlike `assert`, under `python -O` too."""
    if not condition:
        raise Mismatch(message)


# What two correct computations may differ by: some units in the last place of the largest value, however small the
# error of the plain operation happens to be.
FLOOR_ULPS = 4
# How far from the plain operation a result with the same roundings may lie, of the plain operation's own distance from
# the truth. Sums in another order seldom move a value over the edge of a rounding, and the kernels come to 0.02, where
# attention has a cap to 0.35; a rounding too few or too many moves a fifth of all values, and comes to 0.6 and more.
SAME_ROUNDINGS = 0.5


def assert_as_exact(
    given: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    slack: float = 0.0,
    magnitude: float = 0.0,
    name: str = "the result",
) -> float:
    """Asserts that the error of `given` against fp64 truth is at most twice that of the plain operation at the same
    dtype, plus a small floor and, as a part of the largest value, a slack. `magnitude` takes the largest value's place
    where what is added up is larger, as where it cancels. `name` is what the message calls it.

    Returns:
        The error as a share of that bound.
    """
    truth = truth.double()
    largest = max(truth.abs().max().item(), magnitude)
    floor = (FLOOR_ULPS * torch.finfo(given.dtype).eps + slack) * largest
    bound = 2 * (plain.double() - truth).abs().max().item() + floor
    error = (given.double() - truth).abs().max().item()
    plain_error = (bound - floor) / 2
    require(
        error <= bound,
        f"{name}: error {error:.3e} against fp64, expected {bound:.3e} or less; the plain operation's is "
        f"{plain_error:.3e}",
    )
    return error / bound if bound else 0.0


def rms(difference: torch.Tensor) -> float:
    return difference.double().pow(2).mean().sqrt().item()


def assert_same_roundings(
    given: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    bound: float = SAME_ROUNDINGS,
    name: str = "the result",
) -> None:
    """Asserts that `given` rounds where the plain operation does, for dtypes of 16 bits: that it is much nearer to the
    plain result than that is to fp64 truth.

    In fp32 there is nothing to see: sums in another order differ by as much as a rounding.
    """
    distance, error = rms(given.double() - plain.double()), rms(plain.double() - truth.double())
    require(
        distance <= bound * error,
        f"{name}: {distance:.3e} from the plain operation, whose own error is {error:.3e}: a rounding too few or too "
        "many",
    )


def same_bits(given: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal, a NaN being equal to any other."""
    if given.is_floating_point():
        unequal = (given != expected) & ~(given.isnan() & expected.isnan())
        return given.shape == expected.shape and not bool(unequal.any())
    return torch.equal(given, expected)

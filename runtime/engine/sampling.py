"""How an answer's tokens are chosen: validated numbers, which become a row's own."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import InvalidArgument, InvalidArgumentType

SEED_BITS = 64
# Of a seed that nobody chose: a JSON number holds it, whoever reads it.
DRAWN_SEED_BITS = 53
# Beyond, a scaled logit would no longer be finite; the noise is far below a logit's last bit long before.
MOST_INVERSE_TEMPERATURE = 2.0**64


def _check_temperature(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidArgumentType(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and float(value) >= 0):
        raise InvalidArgument(f"{name} must be a finite number from 0 on, got {value}")


def _check_seed(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidArgumentType(f"{name} must be an integer or None, got {value!r}")
    if not 0 <= int(value) < 1 << SEED_BITS:
        raise InvalidArgument(f"{name} must be from 0 to 2^{SEED_BITS} - 1, got {value}")


@dataclass(frozen=True)
class SamplingParams:
    """How one answer's tokens are chosen.

    Args:
        temperature: what logits are divided by before a token is drawn from their softmax; 0 picks the greatest.
        seed: which draws; None for ones that nobody has chosen. Without effect at temperature 0.

    Raises:
        ValueError, TypeError: a value is out of range or of the wrong type.
    """

    temperature: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_temperature("temperature", self.temperature)
        _check_seed("seed", self.seed)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0

    @property
    def inverse_temperature(self) -> float:
        """1 / temperature, as the head takes it; 0 where nothing is drawn."""
        return min(1 / self.temperature, MOST_INVERSE_TEMPERATURE) if self.samples else 0.0

    def with_seed(self) -> SamplingParams:
        """The same with a seed, drawn here if nobody has chosen one; none where nothing is drawn."""
        if not self.samples:
            return SamplingParams()
        return self if self.seed is not None else SamplingParams(self.temperature, secrets.randbits(DRAWN_SEED_BITS))


GREEDY = SamplingParams()

Temperature = float | Sequence[float]
Seed = int | None | Sequence[int | None]


def read_sampling(temperature: Any, seed: Any, rows: int, is_batch: bool) -> tuple[SamplingParams, ...]:
    """The sampling of each row, from one value for all of them or, of a batch, one for each.

    Raises:
        ValueError, TypeError: a value is out of range or of the wrong type, or their number is not that of the prompts.
    """
    temperatures = _of_rows("temperature", temperature, rows, is_batch, _check_temperature)
    seeds = _of_rows("seed", seed, rows, is_batch, _check_seed)
    return tuple(
        SamplingParams(float(t), None if s is None else int(s)) for t, s in zip(temperatures, seeds, strict=True)
    )


def _of_rows(name: str, value: Any, rows: int, is_batch: bool, check: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        if not is_batch:
            raise InvalidArgumentType(f"{name} must be one value for one prompt, got {len(value)}")
        if len(value) != rows:
            raise InvalidArgument(f"{name} must be one value, or one for each of {rows} prompts, got {len(value)}")
        for index, one in enumerate(value):
            check(f"{name}[{index}]", one)
        return list(value)
    check(name, value)
    return [value] * rows

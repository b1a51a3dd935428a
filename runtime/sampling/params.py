"""How an answer's tokens are chosen: a request's sampling options, validated."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from runtime.errors import InvalidArgument, InvalidArgumentType

SEED_BITS = 64
# Of a random seed: every JSON reader holds that many exactly in a number.
DRAWN_SEED_BITS = 53
# Beyond these, a scaled logit would no longer be finite, or the number itself no longer above 0 in fp32. Long before
# that, either the noise is below a logit's last bit or the logits are below the noise's.
MOST_INVERSE_TEMPERATURE = 2.0**64
LEAST_INVERSE_TEMPERATURE = 2.0**-64
MOST_PENALTY = 2.0

Check = Callable[[str, Any], None]


def _number(bounds: str, holds: Callable[[float], bool], *, optional: bool = True) -> Check:
    """A check that a value is a finite number that `holds`, or None if that is `optional`."""

    def check(name: str, value: Any) -> None:
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InvalidArgumentType(f"{name} must be a number{' or None' * optional}, got {value!r}")
        if not (math.isfinite(value) and holds(float(value))):
            raise InvalidArgument(f"{name} must be a finite number {bounds}, got {value}")

    return check


def _whole(bounds: str, most: float = math.inf) -> Check:
    """A check that a value is None or an integer from 0 to `most`."""

    def check(name: str, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InvalidArgumentType(f"{name} must be an integer or None, got {value!r}")
        if not 0 <= int(value) <= most:
            raise InvalidArgument(f"{name} must be {bounds}, got {value}")

    return check


def _check_bias(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise InvalidArgumentType(f"{name} must be a mapping of token ids to numbers or None, got {value!r}")
    for token, bias in value.items():
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise InvalidArgumentType(f"{name} must have token ids as keys, got {token!r}")
        if isinstance(bias, bool) or not isinstance(bias, numbers.Real):
            raise InvalidArgumentType(f"{name}[{token}] must be a number, got {bias!r}")
        if math.isnan(bias) or bias == math.inf:
            raise InvalidArgument(f"{name}[{token}] must be a finite number or -inf, got {bias}")


@dataclass(frozen=True)
class SamplingParams:
    """How one answer's tokens are chosen. None leaves a step out, or takes the checkpoint's value.

    Args:
        temperature: what logits are divided by before a token is drawn from their softmax; 0 picks the greatest.
        top_k: draw only from this many likeliest tokens, and any tied with the last of them; 0 for all.
        top_p: then only from the fewest likeliest tokens that reach this probability together.
        min_p: then only from tokens at least this fraction as likely as the likeliest.
        seed: of the draws; None for a random one. No effect at temperature 0, like the three above.
        repetition_penalty: divides positive logits of tokens in the prompt or the answer, and multiplies negative ones.
        presence_penalty: subtracted from the logits of tokens that occur in the answer.
        frequency_penalty: the same, once per occurrence.
        logit_bias: added to the logits of tokens, by id; -inf bans one.
        min_new_tokens: how many tokens there must be before one may end the answer.
        logprobs: how many of the likeliest tokens to report with each token of the answer, 0 for only its own.
        prompt_logprobs: the same for each token of the prompt.

    Raises:
        ValueError, TypeError: a value is out of range or of the wrong type.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_new_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            check(name, getattr(self, name))

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0

    @property
    def inverse_temperature(self) -> float:
        """1 / temperature, as the head takes it; 0 where nothing is drawn."""
        if not self.samples:
            return 0.0
        return min(max(1 / self.temperature, LEAST_INVERSE_TEMPERATURE), MOST_INVERSE_TEMPERATURE)

    @property
    def filters(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        return self.samples and any((self.top_k, self.top_p not in (None, 1), self.min_p))

    def with_seed(self, index: int = 0) -> SamplingParams:
        """The same with the seed of answer `index` to a prompt: seed + index, or a random one if none was given; None
        where nothing is drawn."""
        if not self.samples:
            return replace(self, seed=None)
        seed = secrets.randbits(DRAWN_SEED_BITS) if self.seed is None else (int(self.seed) + index) % (1 << SEED_BITS)
        return replace(self, seed=seed)


_from_0 = _whole("at least 0")
_penalty = _number(f"from -{MOST_PENALTY:g} to {MOST_PENALTY:g}", lambda x: abs(x) <= MOST_PENALTY, optional=False)
CHECKS: dict[str, Check] = {
    "temperature": _number("from 0 on", lambda x: x >= 0, optional=False),
    "top_k": _from_0,
    "top_p": _number("above 0, at most 1", lambda x: 0 < x <= 1),
    "min_p": _number("from 0 to 1", lambda x: 0 <= x <= 1),
    "seed": _whole(f"from 0 to 2^{SEED_BITS} - 1", (1 << SEED_BITS) - 1),
    "repetition_penalty": _number("above 0", lambda x: x > 0),
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "logit_bias": _check_bias,
    "min_new_tokens": _from_0,
    "logprobs": _from_0,
    "prompt_logprobs": _from_0,
}
GREEDY = SamplingParams()

Numbers = float | Sequence[float]
OptionalNumbers = float | None | Sequence[float | None]
Integers = int | None | Sequence[int | None]
Biases = Mapping[int, float] | None | Sequence[Mapping[int, float] | None]


def read_sampling(options: Mapping[str, Any], rows: int, is_batch: bool) -> tuple[SamplingParams, ...]:
    """The sampling of each row, from one value for all of them or, for a batch, one for each.

    Args:
        options: values of the fields of `SamplingParams`, by name; what is left out has its default.
        rows: how many prompts there are.
        is_batch: whether they are a batch.

    Raises:
        ValueError, TypeError: a value is out of range or of the wrong type, or their number is not that of the prompts.
    """
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    columns = [
        _of_rows(name, options.get(name, default), rows, is_batch, CHECKS[name]) for name, default in defaults.items()
    ]
    return tuple(
        SamplingParams(**{name: _plain(value) for name, value in zip(defaults, row, strict=True)})
        for row in zip(*columns, strict=True)
    )


def _plain(value: Any) -> Any:
    """A number of another type (numpy's) as Python's own."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _of_rows(name: str, value: Any, rows: int, is_batch: bool, check: Check) -> list[Any]:
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

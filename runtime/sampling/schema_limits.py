"""What is refused in JSON schemas, since the library that enforces them would misread it or crash the process."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from runtime.errors import InvalidArgument
from runtime.sampling.json_schema import (
    DIGITS,
    UNWRITTEN,
    get,
    has_unwritten,
    is_number,
    meets_another,
    nested,
    scalars,
)

_OF_VALUES = ("const", "enum", "exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf")
_LARGEST = 2**53 - 1  # in magnitude: the library reads numbers as doubles
_LARGEST_INT64 = 2**63 - 1  # the greatest integer that it has, so it is right as a maximum of integers
_MOST_STEPS = 10_000  # the library has a state for each unit of a multipleOf's last digit
_MOST_LEVELS = 1000  # of schemas within schemas, references followed: the library recurses about 5 kB deeper for each


def check_limits(schema: dict[str, Any], what: str) -> None:
    """Refuse a schema that the library must not be given.

    Args:
        schema: made of JSON's types alone.
        what: the caller's argument and what it must be, for messages.

    Raises:
        InvalidArgument: the message has the reason.
    """
    parts = [part for _, part in nested(schema)]
    for part in parts:
        for keyword in _OF_VALUES:
            for value in scalars(part.get(keyword)):
                if (keyword, part.get("type"), value) != ("maximum", "integer", _LARGEST_INT64):
                    _check_value(value, keyword, what)
        for name in get(part, "patternProperties", dict):
            if has_unwritten(name):
                raise InvalidArgument(f"{what}: patternProperties must name no control characters, got {_short(name)}")
        _check_least_properties(part, what)
    multiples = [part["multipleOf"] for part in parts if is_number(part.get("multipleOf"))]
    if any(meets_another(part) for part in parts):
        _check_multiples(multiples, what)
    for multiple in multiples:
        _check_multiples([multiple], what)
    _check_references(schema, what)


def _check_value(value: Any, keyword: str, what: str) -> None:
    if isinstance(value, str) and any(character in UNWRITTEN for character in value):
        raise InvalidArgument(
            f"{what}: strings of {keyword} must have no control characters but \\b\\t\\n\\f\\r, got {_short(value)}"
        )
    if not is_number(value):
        return
    digits = len(Decimal(str(value)).normalize().as_tuple().digits)
    if abs(value) > _LARGEST or (isinstance(value, float) and digits > DIGITS):
        raise InvalidArgument(
            f"{what}: numbers of {keyword} must be within ±(2**53 - 1), with at most {DIGITS} digits unless they are "
            f"integers, got {_short(value)}"
        )


def _check_least_properties(part: dict[str, Any], what: str) -> None:
    """Refuse too great a minProperties: names of properties that are not listed may repeat, and a repeated name is one
    property."""
    least: Any = part.get("minProperties")
    required = {str(name) for name in get(part, "required", list)}
    if is_number(least) and least > len(required) + 1:
        raise InvalidArgument(
            f"{what}: minProperties must be at most one more than the {len(required)} required properties, got {least}"
        )


def _check_multiples(multiples: list[Any], what: str) -> None:
    """Check multipleOf of one schema, or of several that may combine: the library looks for common multiples."""
    decimals = [Decimal(str(multiple)).normalize() for multiple in multiples]
    places = max([0, *(-int(number.as_tuple().exponent) for number in decimals)])
    steps = 1
    for number in decimals:
        steps = math.lcm(steps, abs(int(number.scaleb(places))))
        if steps > _MOST_STEPS:
            raise InvalidArgument(
                f"{what}: multipleOf, or the least common multiple of several, must be at most {_MOST_STEPS:,} units "
                f"of the last digit, got {' and '.join(map(str, multiples[:3]))}"
            )


def _check_references(schema: dict[str, Any], what: str) -> None:
    depths = {part["$ref"]: depth for depth, part in nested(schema) if isinstance(part.get("$ref"), str)}
    deepest = max(depths.values(), default=0)
    if len(depths) * deepest > _MOST_LEVELS:
        most = _MOST_LEVELS // deepest
        raise InvalidArgument(
            f"{what}: where a $ref is {deepest} schemas deep, at most {most} may be different, got {len(depths)}"
        )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."

"""JSON schemas as they are enforced: an object has the properties that its schema lists, and no others.

The library reads most of JSON Schema correctly, and refuses most of the rest by name. Some of what it would misread is
rewritten here so that it reads it correctly; schema_limits.py refuses the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, TypeVar
from urllib.parse import unquote

_T = TypeVar("_T", list[Any], dict[str, Any])

_COMBINE = {"$ref", "allOf", "anyOf", "oneOf"}
# What may stand beside one of those without a second schema for the same value.
_BESIDE = {
    *("$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "discriminator"),
    *("examples", "nullable", "readOnly", "title", "type", "writeOnly"),
}
_OF_OTHERS = {"additionalProperties", "minProperties", "patternProperties", "unevaluatedProperties"}
_BY_NAME = {"$defs", "definitions", "patternProperties", "properties"}  # their values hold schemas by names
_NO_SCHEMAS = {"const", "default", "enum", "examples"}
# A schema has at least one of these, or is empty.
KEYWORDS = {
    *(_COMBINE | _BESIDE | _OF_OTHERS | _BY_NAME | _NO_SCHEMAS),
    *("$dynamicRef", "$recursiveRef", "additionalItems", "contains", "contentEncoding", "contentMediaType"),
    *("dependencies", "dependentRequired", "dependentSchemas", "else", "exclusiveMaximum", "exclusiveMinimum"),
    *("format", "if", "items", "maxContains", "maxItems", "maxLength", "maxProperties", "maximum", "minContains"),
    *("minItems", "minLength", "minimum", "multipleOf", "not", "pattern", "prefixItems", "propertyNames", "required"),
    *("then", "unevaluatedItems", "uniqueItems"),
}
DIGITS = 15  # the library reads some longer numbers as a double next to the nearest one
_ABOVE_ZERO = 1e-30
# The control characters that strings are written without (response_format.py); the library drops them from patterns.
UNWRITTEN = "".join(map(chr, (*range(8), 11, *range(14, 32), 127)))
_WRITTEN_ONLY = "^[^" + "".join(f"\\x{ord(character):02x}" for character in UNWRITTEN) + "]*$"
_ESCAPE = re.compile(r"\\[av]|\\(?:x|u00|U0{6})(?:[01][\da-f]|7f)|\\[xu]\{0*(?:1?[\da-f]|7f)\}", re.IGNORECASE)
# Dates and times as Python has them: no 29 February in other years, no year 0, no leap second.
_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_MONTH_AND_DAY = (
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
)
_DATE = f"(?:{_YEAR}-(?:{_MONTH_AND_DAY})|{_LEAP_YEAR}-02-29)"
_HOUR_AND_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR_AND_MINUTE}:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]{_HOUR_AND_MINUTE})"
_PATTERNS = {"date": f"^{_DATE}$", "date-time": f"^{_DATE}[Tt]{_TIME}$", "time": f"^{_TIME}$"}
# What the library's host names need besides: no label that encodes another, such as xn--a, and no name that is too
# long.
_LABEL = "(?:[^.]{1,3}|[^.]{2}[^.-][^.]*|[^.]{3}[^.-][^.]*)"
_HOST_NAMES = [rf"^{_LABEL}(?:\.{_LABEL})*$", "^.{1,253}$"]


def reworded(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, rewritten so that the library reads it correctly.

    Args:
        schema: made of JSON's types alone.
    """
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    parts = [part for _, part in nested(copy)]
    _exclude_whole_bounds(parts)
    for part in parts:
        _require_discriminator(part, copy)
        patterns = [_WRITTEN_ONLY] if has_unwritten(part.get("pattern")) else []
        if part.get("format") == "hostname":
            patterns += _HOST_NAMES
        elif str(part.get("format")) in _PATTERNS:
            patterns.append(_PATTERNS[part.pop("format")])
        if patterns and "pattern" not in part:
            part["pattern"] = patterns.pop()
        if patterns:
            part["allOf"] = [*get(part, "allOf", list), *({"pattern": pattern} for pattern in patterns)]
        # Keywords that bear on one another, such as `items` and `additionalItems`, are read together only if no schema
        # to combine with comes between them.
        words = sorted(part.items(), key=lambda item: item[0] in _COMBINE | {"const", "enum"})
        part.clear()
        part.update(words)
    return copy


def has_one_of(schema: dict[str, Any]) -> bool:
    """Whether a `oneOf` is in a schema."""
    return any("oneOf" in part for _, part in nested(schema))


def close_objects(schema: dict[str, Any]) -> None:
    """Add `additionalProperties: false` to each object that lists properties and says nothing about others.

    A schema in which two schemas apply to one value (`allOf` and the like) is left alone: each would forbid the other's
    properties.

    Args:
        schema: made of JSON's types alone; changed in place.
    """
    parts = [part for _, part in nested(schema)]
    if not any(meets_another(part) for part in parts):
        for part in parts:
            if "properties" in part and not part.keys() & _OF_OTHERS and not _requires_others(part):
                part["additionalProperties"] = False


def is_endless(schema: dict[str, Any]) -> bool:
    """Whether every value of a schema must hold another one, without end, so that none is ever complete.

    Args:
        schema: what the library accepts.
    """
    found = nested(schema)
    if any("$id" in part for depth, part in found if depth > 1):
        return False  # references may be relative to those
    targets = {part["$ref"]: _target(schema, part["$ref"]) for _, part in found if isinstance(part.get("$ref"), str)}
    whole: set[str] = set()  # references whose values can be complete
    while more := {name for name, part in targets.items() if name not in whole and _can_end(part, whole)}:
        whole |= more
    return not _can_end(schema, whole)


def nested(schema: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """All schemas within a schema, itself included, and the depth of each."""
    found = [(1, schema)]
    for depth, part in found:  # grows meanwhile
        for keyword, value in part.items():
            if keyword in _NO_SCHEMAS:
                continue
            if keyword in _BY_NAME and isinstance(value, dict):
                value = list(value.values())
            parts = value if isinstance(value, list) else [value]
            found += [(depth + 1, inner) for inner in parts if isinstance(inner, dict)]
    return found


def get(schema: dict[str, Any], keyword: str, of: type[_T]) -> _T:
    """A keyword's value, or an empty one where it is of another type, which the library refuses where it matters."""
    value = schema.get(keyword)
    return value if isinstance(value, of) else of()


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def scalars(value: Any) -> Iterator[Any]:
    """The values that are not objects or lists within a value; names are left out."""
    ahead = [value]
    while ahead:
        value = ahead.pop()
        if isinstance(value, (dict, list)):
            ahead += value.values() if isinstance(value, dict) else value
        else:
            yield value


def has_unwritten(pattern: Any) -> bool:
    """Whether a pattern may name control characters that strings are written without."""
    return isinstance(pattern, str) and bool(_ESCAPE.search(pattern) or any(letter in UNWRITTEN for letter in pattern))


def _numbers(value: Any) -> list[Any]:
    return [value] if is_number(value) else []


def _exclude_whole_bounds(parts: list[dict[str, Any]]) -> None:
    """Write an integer exclusive bound as an inclusive one just beyond it, where an opposite bound is less than 1
    further from 0.

    Otherwise the library would write 0 where a number must be above 0 and at most 0.5.
    """
    for exclusive, inclusive, others, sign in (
        ("exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"), 1),
        ("exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"), -1),
    ):
        farther = {sign * number for part in parts for other in others for number in _numbers(part.get(other))}
        for part in parts:
            bound = part.get(inclusive) if part.get(exclusive) is True else part.get(exclusive)  # True: of draft 4
            for near in (sign * number for number in _numbers(bound) if number % 1 == 0):
                if any(0 <= near < far < near + 1 for far in farther):
                    exact = Decimal(near)
                    beyond = float(exact + Decimal(1).scaleb(exact.adjusted() + 1 - DIGITS)) if near else _ABOVE_ZERO
                    del part[exclusive]
                    part[inclusive] = sign * max([beyond, *(sign * number for number in _numbers(part.get(inclusive)))])


def _require_discriminator(schema: dict[str, Any], root: dict[str, Any]) -> None:
    """Require the property that tells a schema's options apart: pydantic asks for it, default or not."""
    name = get(schema, "discriminator", dict).get("propertyName")
    for option in get(schema, "oneOf", list):
        part = _target(root, option["$ref"]) if isinstance(option, dict) and "$ref" in option else option
        if isinstance(part, dict) and isinstance(name, str) and name in get(part, "properties", dict):
            part["required"] = list(dict.fromkeys([*get(part, "required", list), name]))


def _requires_others(schema: dict[str, Any]) -> bool:
    return any(str(name) not in get(schema, "properties", dict) for name in get(schema, "required", list))


def meets_another(schema: dict[str, Any]) -> bool:
    combining = schema.keys() & _COMBINE
    all_of = schema.get("allOf")
    is_several = len(combining) > 1 or (isinstance(all_of, list) and len(all_of) > 1)
    return bool(combining) and (is_several or not schema.keys() - combining <= _BESIDE)


def _target(root: dict[str, Any], reference: Any) -> Any:
    """What a reference names by its path in the document; None for another kind of reference, or if nothing is
    there."""
    if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
        return None
    place: Any = root
    for step in unquote(reference[1:]).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(place, list):
            place = place[int(step)] if step.isdecimal() and int(step) < len(place) else None
        else:
            place = place.get(step) if isinstance(place, dict) else None
    return place


def _can_end(schema: Any, whole: set[str]) -> bool:
    """Whether a value of the schema can be complete if those of the references in `whole` can be."""
    if not isinstance(schema, dict):
        return True
    parts = list(get(schema, "allOf", list))
    if schema.get("type") == "object":
        listed, others = get(schema, "properties", dict), schema.get("additionalProperties")
        parts += [listed.get(str(name), others) for name in get(schema, "required", list)]
    if schema.get("type") == "array":
        least = schema.get("minItems")
        parts += [*get(schema, "prefixItems", list), schema.get("items")][: least if isinstance(least, int) else 0]
    choices = [options for word in ("anyOf", "oneOf") if (options := get(schema, word, list))]
    return (
        ("$ref" not in schema or str(schema["$ref"]) in whole)
        and all(_can_end(part, whole) for part in parts)
        and all(any(_can_end(part, whole) for part in options) for options in choices)
    )

"""JSON schemas as they are enforced: an object has the properties that its schema lists, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_COMBINE = {"$ref", "allOf", "anyOf", "oneOf"}
# What may stand beside one of those without a second schema for the same value.
_BESIDE = {
    *("$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "discriminator"),
    *("examples", "nullable", "readOnly", "title", "type", "writeOnly"),
}
_OF_OTHERS = {"additionalProperties", "minProperties", "patternProperties", "unevaluatedProperties"}
_BY_NAME = {"$defs", "definitions", "patternProperties", "properties"}  # their values hold schemas by names
_NO_SCHEMAS = {"const", "default", "enum", "examples"}
# A schema has one of them, or is empty.
KEYWORDS = {
    *(_COMBINE | _BESIDE | _OF_OTHERS | _BY_NAME | _NO_SCHEMAS),
    *("contains", "dependentRequired", "exclusiveMaximum", "exclusiveMinimum", "format", "if", "items", "maxItems"),
    *("maxLength", "maxProperties", "maximum", "minItems", "minLength", "minimum", "multipleOf", "not", "pattern"),
    *("prefixItems", "propertyNames", "required", "uniqueItems"),
}


def close_objects(schema: dict[str, Any]) -> None:
    """Add `additionalProperties: false` to each object that lists properties and says nothing of others.

    A schema in which two meet in one value (`allOf` and the like) is left alone: each would forbid the others.

    Args:
        schema: made of JSON's types alone; changed in place.
    """
    parts = [schema, *_parts(schema)]
    if not any(_meets_another(part) for part in parts):
        for part in parts:
            if "properties" in part and not part.keys() & _OF_OTHERS and not _requires_others(part):
                part["additionalProperties"] = False


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All schemas within a schema."""
    for keyword, value in schema.items():
        if keyword in _NO_SCHEMAS:
            continue
        if keyword in _BY_NAME and isinstance(value, dict):
            value = list(value.values())
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield part
                yield from _parts(part)


def _requires_others(schema: dict[str, Any]) -> bool:
    listed, required = schema["properties"], schema.get("required")
    return isinstance(required, list) and any(name not in listed for name in required)


def _meets_another(schema: dict[str, Any]) -> bool:
    combining = schema.keys() & _COMBINE
    all_of = schema.get("allOf")
    is_several = len(combining) > 1 or (isinstance(all_of, list) and len(all_of) > 1)
    return bool(combining) and (is_several or not schema.keys() - combining <= _BESIDE)

"""A call as a JSON object of a name and arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.sampling.response_format import ResponseFormat, read_response_format
from runtime.serve.strict_json import begin_json
from runtime.serve.tool import Function


@dataclass(frozen=True)
class JsonNotation:
    """How the object is written.

    Args:
        name, arguments: its keys.
    """

    name: str
    arguments: str

    opening = "{"

    @classmethod
    def found_in(cls, turn: str, name: str, arguments: Mapping[str, Any]) -> tuple[JsonNotation, int, int] | None:
        """The notation in which a turn calls `name`, and where the object begins and ends; None without such a call."""
        wanted = {json.dumps(part) for part in (name, arguments)}
        for begin in (index for index, character in enumerate(turn) if character == "{"):
            try:
                value, length = begin_json(turn[begin:])
            except ValueError:
                continue
            keys = {json.dumps(item): key for key, item in value.items()}
            if keys.keys() == wanted:
                return cls(keys[json.dumps(name)], keys[json.dumps(arguments)]), begin, begin + length
        return None

    def read(self, text: str) -> tuple[str, dict[str, Any], int] | None:
        """The call that a text begins with: name, arguments and where its object ends; None if there is none."""
        try:
            value, end = begin_json(text)
        except ValueError:
            return None
        if not isinstance(value, dict) or value.keys() != {self.name, self.arguments}:
            return None
        name, arguments = value[self.name], value[self.arguments]
        return (name, arguments, end) if isinstance(name, str) and isinstance(arguments, dict) else None

    def forced(self, functions: Sequence[Function]) -> ResponseFormat:
        """The format of a text that is exactly one call of one of these functions.

        Raises:
            ValueError, TypeError: a function's parameters are not a schema that can be enforced.
        """
        alone = len(functions) == 1
        calls = [
            self._schema(function, "#" if alone else f"#/anyOf/{index}") for index, function in enumerate(functions)
        ]
        schema = calls[0] if alone else {"anyOf": calls}
        wanted = read_response_format({"type": "json_schema", "json_schema": {"schema": schema}})
        assert wanted is not None
        return wanted

    def _schema(self, function: Function, at: str) -> dict[str, Any]:
        parameters = {"type": "object"} | (function.parameters or {"properties": {}})
        return {
            "type": "object",
            "properties": {
                self.name: {"const": function.name},
                self.arguments: _moved(parameters, f"{at}/properties/{self.arguments}"),
            },
            "required": [self.name, self.arguments],
        }


def _moved(schema: Any, to: str) -> Any:
    """A schema with its references to itself rewritten for its place `to` in another schema."""
    if isinstance(schema, list):
        return [_moved(part, to) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: to + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, to)
        for key, value in schema.items()
    }

"""A call as FunctionGemma writes one: `name{key:value,key:value}`.

Strings stand between two quotes that are a token of their own, `<escape>` in FunctionGemma, and hold anything else
verbatim. Keys are bare; numbers are as in JSON; lists stand in brackets, objects in braces; nothing has white space
around it. The template decides what the quote is and how true, false and null are written.

Source: Google's "FunctionGemma formatting and best practices".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.serve.error import ApiError
from runtime.serve.strict_json import begin_json
from runtime.serve.tool import Function

_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_BARE = re.compile(r"[^{}\[\],:]+")  # a key, a number or a word


@dataclass(frozen=True)
class KeyedNotation:
    """How values are written.

    Args:
        quote: the text before and after a string.
        words: what stands for true, false and null, in this order.
    """

    quote: str
    words: tuple[str, str, str]

    opening = ""

    @classmethod
    def found_in(cls, turn: str, name: str, arguments: Mapping[str, Any]) -> tuple[KeyedNotation, int, int] | None:
        """The notation in which a turn calls `name` after some other text, and where the call begins and ends; None if
        it has no such call."""
        begin = turn.find(name + "{")
        if begin <= 0:
            return None
        texts = re.escape(next(value for value in arguments.values() if isinstance(value, str)))
        quote = re.search(rf"[\[:,]([^\[:,{{}}\]]+){texts}\1", turn[begin:])
        words = re.search(r":(\w+),\w+:(\w+),\w+:(\w+)[,}]", turn[begin:])
        if quote is None or words is None:
            return None
        notation = cls(quote[1], (words[1], words[2], words[3]))
        read = notation.read(turn[begin:])
        return (notation, begin, begin + read[2]) if read and read[:2] == (name, arguments) else None

    def read(self, text: str) -> tuple[str, dict[str, Any], int] | None:
        """The call that a text begins with: name, arguments and where it ends; None if there is none."""
        name = _NAME.match(text)
        if name is None:
            return None
        try:
            arguments, end = self._object(text, name.end())
        except (ValueError, RecursionError):
            return None
        return name[0], arguments, end

    def forced(self, functions: Sequence[Function]) -> NoReturn:
        """Refuses: no grammar here can enforce a schema in this notation.

        Raises:
            ApiError: always.
        """
        message = 'tool_choice must be "auto" or "none" for this model, whose calls are no JSON that can be enforced'
        raise ApiError(400, message, param="tool_choice", code="unsupported_parameter")

    def _object(self, text: str, at: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}

        def entry(at: int) -> int:
            key = _bare(text, at)
            if key in found or key != key.strip() or self.quote in key:
                raise ValueError(f"{key} comes twice, or is no bare key")
            found[key], end = self._value(text, _skip(text, at + len(key), ":"))
            return end

        return found, _series(text, at, "{}", entry)

    def _value(self, text: str, at: int) -> tuple[Any, int]:
        if text.startswith(self.quote, at):
            end = text.index(self.quote, at + len(self.quote))
            return text[at + len(self.quote) : end], end + len(self.quote)
        if text.startswith("{", at):
            return self._object(text, at)
        if text.startswith("[", at):
            found: list[Any] = []

            def item(at: int) -> int:
                value, end = self._value(text, at)
                found.append(value)
                return end

            return found, _series(text, at, "[]", item)
        word = _bare(text, at)
        if word in self.words:
            return (True, False, None)[self.words.index(word)], at + len(word)
        number, length = begin_json(word)
        if length != len(word) or isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{word} is no number")
        return number, at + length


def _series(text: str, at: int, brackets: str, read: Callable[[int], int]) -> int:
    """Reads a comma-separated series in brackets; returns where it ends."""
    at = _skip(text, at, brackets[0])
    if text.startswith(brackets[1], at):
        return at + 1
    while True:
        at = read(at)
        if text.startswith(brackets[1], at):
            return at + 1
        at = _skip(text, at, ",")


def _bare(text: str, at: int) -> str:
    found = _BARE.match(text, at)
    if found is None:
        raise ValueError(f"nothing at {at}")
    return found[0]


def _skip(text: str, at: int, expected: str) -> int:
    if not text.startswith(expected, at):
        raise ValueError(f"no {expected} at {at}")
    return at + len(expected)

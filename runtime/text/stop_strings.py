"""Ending an answer at a string, as transformers' `stop_strings` does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopStrings:
    """Watches what a sequence spells, token by token, for the first stop string that a new token completes.

    It is looked for in bytes and with special tokens spelled out, so it may hold one, begin or end inside a token, and
    begin in the prompt. Of several stop strings the one that ends first counts, and of those that end together the
    longest.

    Args:
        strings: what to look for.
        prompt: what the prompt's tokens spell, the last ones at least; None for an id that spells nothing.
    """

    def __init__(self, strings: Sequence[str], prompt: Iterable[bytes | None] = ()) -> None:
        self._strings = [string.encode() for string in strings]
        self._longest = max(map(len, self._strings), default=1)
        self._tail = b""  # of what has been spelled, as much as can be the beginning of a stop string
        for spelled in prompt:
            self.push(spelled)

    def push(self, spelled: bytes | None) -> int | None:
        """Take in what the next token spells.

        Returns:
            Where the stop string begins that it completes, in bytes before its end; None where it completes none.
        """
        if spelled is None:  # an id without a token: no stop string spans it
            self._tail = b""
            return None
        text, before = self._tail + spelled, len(self._tail)
        self._tail = text[max(0, len(text) - self._longest + 1) :]
        ends = [
            (at + len(string), at)
            for string in self._strings
            if (at := text.find(string, max(0, before + 1 - len(string)))) >= 0
        ]
        return len(text) - min(ends)[1] if ends else None

    @property
    def pending(self) -> int:
        """How many of the last bytes may be the beginning of a stop string."""
        return max((_overlap(self._tail, string) for string in self._strings), default=0)


def _overlap(text: bytes, string: bytes) -> int:
    """Length of the longest end of `text` that is a proper beginning of `string`."""
    return next((size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0)

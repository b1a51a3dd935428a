"""Ending an answer at a string, as transformers' `stop_strings` does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopStrings:
    """Searches a growing sequence of tokens for stop strings.

    Matches bytes, special tokens included, so that a stop string may contain a special token, begin or end inside a
    token, and begin in the prompt. Of several matches the one that ends first counts, of those that end together the
    longest.

    Args:
        strings: the stop strings.
        prompt: the bytes of the prompt's tokens, at least of the last ones; None for an id without bytes.
    """

    def __init__(self, strings: Sequence[str], prompt: Iterable[bytes | None] = ()) -> None:
        self._strings = [string.encode() for string in strings]
        self._longest = max(map(len, self._strings), default=1)
        self._tail = b""  # the last bytes, as many as can begin a stop string
        for token_bytes in prompt:
            self.push(token_bytes)

    def push(self, token_bytes: bytes | None) -> int | None:
        """Add the next token.

        Returns:
            How many bytes before the token's end the stop string that it completes begins; None if it completes none.
        """
        if token_bytes is None:  # no stop string spans an id without a token
            self._tail = b""
            return None
        text, before = self._tail + token_bytes, len(self._tail)
        self._tail = text[max(0, len(text) - self._longest + 1) :]
        ends = [
            (at + len(string), at)
            for string in self._strings
            if (at := text.find(string, max(0, before + 1 - len(string)))) >= 0
        ]
        return len(text) - min(ends)[1] if ends else None

    @property
    def pending(self) -> int:
        """How many of the last bytes may begin a stop string."""
        return max((_overlap(self._tail, string) for string in self._strings), default=0)


def _overlap(text: bytes, string: bytes) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `string`."""
    return next((size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0)

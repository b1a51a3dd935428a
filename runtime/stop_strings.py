"""Ending a text at a string, while it arrives in deltas that know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through until a stop string completes, holding back what may be the beginning of one.

    Of several stop strings the one that completes first in the text counts, and of those completing together the
    longest, so the cut does not depend on how the text was split into deltas.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, delta: str) -> str:
        """Take in more text; return what is safe to show. After `found` is set nothing more passes."""
        if self.found:
            return ""
        text = self._held + delta
        ends = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text is over: return what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `string`."""
    return next((size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0)

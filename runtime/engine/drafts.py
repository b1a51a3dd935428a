"""Guesses at a text's next tokens: those that followed when its last tokens last occurred (prompt lookup).

Models that quote, edit or correct their input repeat most of it. The text's last tokens are looked up earlier in the
text, the longest run first, and what followed their most recent occurrence is the guess. The next token shows whether a
guess was right, however the token was picked and whether or not the guess was checked, so counting how often guesses
are right costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

LONGEST_MATCH = 5  # most tokens that are looked up as one run
# How often a guess after a match of 1, 2, ... tokens is assumed to be right before any has been seen; the assumption
# weighs as much as one guess seen. Each guess seen multiplies the weight of what came before it by REMEMBERED. Even if
# no guess were ever right, the steps that find that out would take 2 to 3 % of an answer of 64 tokens.
CHANCES = (0.1, 0.25, 0.4, 0.5, 0.6)
REMEMBERED = 0.9


class Match(NamedTuple):
    """An earlier occurrence of a text's last tokens."""

    length: int  # tokens that are the same, 0 to LONGEST_MATCH
    end: int  # the place of the token after them


class Drafts:
    """The guesses at one text's next tokens."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        # By run of tokens: the place of the token that most recently followed it.
        self._ends: dict[tuple[int, ...], int] = {}
        self._right = list(CHANCES)  # by the length of the match
        self._seen = [1.0] * LONGEST_MATCH
        for token in ids:
            self._append(token)

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Appends tokens to the text; each shows whether a guess would have been right."""
        for token in ids:
            length, end = self.match()
            if length:
                at = length - 1
                self._right[at] = REMEMBERED * self._right[at] + (self._ids[end] == token)
                self._seen[at] = REMEMBERED * self._seen[at] + 1
            self._append(token)

    def match(self) -> Match:
        """The most recent earlier occurrence of the text's last tokens: of as many as have one, up to LONGEST_MATCH."""
        for length in range(min(LONGEST_MATCH, len(self._ids)), 0, -1):
            end = self._ends.get(tuple(self._ids[-length:]))
            if end is not None:
                return Match(length, end)
        return Match(0, 0)

    def after(self, match: Match, count: int) -> list[int]:
        """The `count` guesses after a match. At the text's end they start over from the match: a text that repeats
        itself is assumed to go on doing so."""
        period = len(self._ids) - match.end
        return [self._ids[match.end + place % period] for place in range(count)]

    def chance(self, length: int) -> float:
        """How often a guess after a match of `length` tokens, at least one, has been right."""
        at = min(length, LONGEST_MATCH) - 1
        return self._right[at] / self._seen[at]

    def _append(self, token: int) -> None:
        end = len(self._ids)
        for length in range(1, min(LONGEST_MATCH, end) + 1):
            self._ends[tuple(self._ids[end - length :])] = end
        self._ids.append(token)

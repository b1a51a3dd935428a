"""Guesses at what comes next: what came next the last time that a text went as it goes now (prompt lookup).

Models that quote, edit or correct what they were given say most of it again. What has been written is looked up by its
last tokens, the most of them first, and what followed them most recently is the guess. Whether such a guess was right
is known with the next token, whoever has picked it and whether the guess has been checked or not: so how often they are
right is counted at no cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

LONGEST_MATCH = 5  # tokens that are looked up at once
# How often a guess after a match of 1, 2, ... tokens is taken to be right before any has been seen: this weighs as much
# as one that has, and each one seen leaves so much of the weight of those before it. Even if no guess ever came true,
# the steps that find that out would take 2 to 3 % of an answer of 64 tokens.
CHANCES = (0.1, 0.25, 0.4, 0.5, 0.6)
REMEMBERED = 0.9


class Match(NamedTuple):
    """Where the last tokens of a text stood before."""

    length: int  # tokens that are the same, 0 to LONGEST_MATCH
    end: int  # the place of the token after them


class Drafts:
    """The guesses at one text's next tokens."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._ends: dict[
            tuple[int, ...], int
        ] = {}  # of the most recent place of each run of tokens that has a next one
        self._right = list(CHANCES)  # by the length of the match
        self._seen = [1.0] * LONGEST_MATCH
        for token in ids:
            self._append(token)

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, ids: Sequence[int]) -> None:
        """The text goes on with these tokens; each shows whether a guess would have been right."""
        for token in ids:
            length, end = self.match()
            if length:
                at = length - 1
                self._right[at] = REMEMBERED * self._right[at] + (self._ids[end] == token)
                self._seen[at] = REMEMBERED * self._seen[at] + 1
            self._append(token)

    def match(self) -> Match:
        """The most recent place where the text's last tokens stood before, for as many of them as there is one, up to
        LONGEST_MATCH."""
        for length in range(min(LONGEST_MATCH, len(self._ids)), 0, -1):
            end = self._ends.get(tuple(self._ids[-length:]))
            if end is not None:
                return Match(length, end)
        return Match(0, 0)

    def after(self, match: Match, count: int) -> list[int]:
        """The guesses that follow from a match. Where they come to the text's end they go on from its place: a text
        that repeats itself is taken to go on doing so."""
        period = len(self._ids) - match.end
        return [self._ids[match.end + place % period] for place in range(count)]

    def chance(self, length: int) -> float:
        """How often a guess after a match of so many tokens, at least one, has been right."""
        at = min(length, LONGEST_MATCH) - 1
        return self._right[at] / self._seen[at]

    def _append(self, token: int) -> None:
        end = len(self._ids)
        for length in range(1, min(LONGEST_MATCH, end) + 1):
            self._ends[tuple(self._ids[end - length :])] = end
        self._ids.append(token)

"""The decode state as steps see it: its first rows, with or without their logits."""

from __future__ import annotations

import functools

from runtime.families.state import DecodeState


class Views:
    """Views of a state, each made once: the graphs captured on it are looked up by the view.

    Args:
        state: of all rows.
        vocab: the number of logits of a row.
    """

    def __init__(self, state: DecodeState, vocab: int) -> None:
        self._state, self._vocab = state, vocab
        self._first: dict[tuple[int, bool], DecodeState] = {}

    @functools.cached_property
    def with_logits(self) -> DecodeState:
        """All rows, whose steps and prompts also leave their logits, in a buffer made with the first request for it."""
        return self._state.with_logits(self._vocab)

    def first(self, rows: int, with_logits: bool = False) -> DecodeState:
        """The first rows."""
        key = rows, with_logits
        if key not in self._first:
            self._first[key] = (self.with_logits if with_logits else self._state).first_rows(rows)
        return self._first[key]

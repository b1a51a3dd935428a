"""The answers that wait for a row, in the order of their requests."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence

from runtime.engine.answer import Answer


class Queue:
    """The waiting answers. Any thread may add to it; whoever has the turn reads it and takes from it.

    An answer may be in it twice, or have a row already, if adding or removing it was interrupted. A forked child has a
    queue of its own: answers in the parent's have no reader there.
    """

    def __init__(self) -> None:
        self._by_process: dict[int, deque[Answer]] = {}

    @property
    def _waiting(self) -> deque[Answer]:
        """This process's queue, made on first use; setdefault is atomic, so that threads share it."""
        process = os.getpid()
        waiting = self._by_process.get(process)
        return self._by_process.setdefault(process, deque()) if waiting is None else waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def __getitem__(self, place: int) -> Answer:
        return self._waiting[place]

    def __iter__(self) -> Iterator[Answer]:
        """The answers that wait now: a snapshot, unaffected by later changes."""
        return iter(tuple(self._waiting))

    def add(self, answers: Sequence[Answer]) -> None:
        """Puts answers at the end of the queue."""
        self._waiting.extend([answer for answer in answers if not answer.is_over])  # in one call: others add theirs

    def put_back(self, answers: Sequence[Answer]) -> None:
        """Puts answers back at the front of the queue."""
        self._waiting.extendleft(reversed(answers))

    def pop(self) -> None:
        """Removes the first answer."""
        self._waiting.popleft()

    def remove_finished(self) -> None:
        """Removes the answers that are over."""
        for answer in self:
            if answer.is_over:
                self._waiting.remove(answer)  # in place, for other threads add to it meanwhile

    def clear(self) -> None:
        """Removes all answers."""
        self._waiting.clear()

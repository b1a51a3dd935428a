"""The answers that wait for a row, in the order of their requests."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence

from runtime.engine.answer import Answer


class Queue:
    """Any thread may add to it; whoever has the turn looks at it and takes from it.

    An answer may be in it twice, or have a row already, where what was to add or to remove it was cut short. A forked
    child has a queue of its own: who waits in the parent's has no reader there.
    """

    def __init__(self) -> None:
        self._by_process: dict[int, deque[Answer]] = {}

    @property
    def _waiting(self) -> deque[Answer]:
        """This process's. The first use makes it: atomic, so that threads share it."""
        process = os.getpid()
        waiting = self._by_process.get(process)
        return self._by_process.setdefault(process, deque()) if waiting is None else waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def __getitem__(self, place: int) -> Answer:
        return self._waiting[place]

    def __iter__(self) -> Iterator[Answer]:
        """Those that wait now, whoever comes or goes meanwhile."""
        return iter(tuple(self._waiting))

    def add(self, answers: Sequence[Answer]) -> None:
        """Lets answers wait behind all others."""
        self._waiting.extend([answer for answer in answers if not answer.is_over])  # at once: others add theirs

    def put_back(self, answers: Sequence[Answer]) -> None:
        """Lets answers wait again, before all others."""
        self._waiting.extendleft(reversed(answers))

    def pop(self) -> None:
        """Takes out the first one."""
        self._waiting.popleft()

    def remove_finished(self) -> None:
        """Takes out those that are over."""
        for answer in self:
            if answer.is_over:
                self._waiting.remove(answer)  # in place, for other threads add to it meanwhile

    def clear(self) -> None:
        """Takes out all."""
        self._waiting.clear()

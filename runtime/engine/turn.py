"""Whose turn it is to run the model: one thread at a time, and no thread for longer than it drives."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

LONGEST_WAIT_S = 0.1
RESERVED_S = 0.2  # how long the turn stays reserved after a waiter for `held` last looked


class Line:
    """Who has the turn in one process, and who would take it."""

    def __init__(self) -> None:
        self.holder: object = None  # given back by assigning None, not by a call that an interrupt could precede
        self.waiting: dict[object, threading.Event] = {}  # in order of arrival
        self.waiting_alone: dict[object, threading.Event] = {}  # likewise, those who would hold it for longer
        self.reserved_until = 0.0  # by time.monotonic(): for them
        self._mutex = threading.Lock()

    def take(self, token: object, alone: bool = False) -> bool:
        """Takes the turn if it is free and not reserved for others; says whether `token` has it."""
        with self._mutex:
            if self.holder is None and (alone or time.monotonic() >= self.reserved_until):
                self.holder = token
        return self.holder is token


class Turn:
    """The right to run the model, held by a token and not by a thread, so that no thread's end or reuse matters.

    It is free in a forked child, where neither the thread that held it nor those that waited exist.
    """

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}  # by process

    @property
    def line(self) -> Line:
        """This process's line, made on first use; setdefault is atomic, so that threads share it."""
        process = os.getpid()
        return self._lines.get(process) or self._lines.setdefault(process, Line())

    def run(self, action: Callable[[], object]) -> bool:
        """Runs an action as the holder of the turn unless somebody else has it or waits to be alone; says whether it
        ran."""
        line, token = self.line, object()
        try:
            if line.take(token):
                action()
                return True
        finally:
            if line.holder is token:
                line.holder = None
        self.wake_next()  # where it is free, but reserved
        return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Waits for the turn and holds it inside the `with` block. Threads that run one action after another let it in
        between two of them."""
        line, token = self.line, object()
        with self._registered(line.waiting_alone, threading.Event()) as ready:
            try:
                while not line.take(token, alone=True):
                    line.reserved_until = time.monotonic() + RESERVED_S  # and no longer, should this be interrupted
                    self.wait(ready)
                line.reserved_until = 0.0
                yield
            finally:
                if line.holder is token:
                    line.holder = None

    def waits(self, ready: threading.Event) -> AbstractContextManager[threading.Event]:
        """Registers an event, which is set when its waiter should look again."""
        return self._registered(self.line.waiting, ready)

    @contextmanager
    def _registered(self, waiting: dict[object, threading.Event], ready: threading.Event) -> Iterator[threading.Event]:
        token = object()
        try:
            waiting[token] = ready
            yield ready
        finally:
            waiting.pop(token, None)
            self.wake_next()

    def wait(self, ready: threading.Event) -> None:
        """Waits for an event and clears it. Not for ever, since an interrupt may have come before a `wake_next`."""
        ready.wait(LONGEST_WAIT_S)
        ready.clear()

    def wake_next(self) -> None:
        """Tells the first of those who wait that the turn is free, if it is."""
        line = self.line
        if line.holder is None:
            for ready in [*line.waiting_alone.values(), *line.waiting.values()][:1]:
                ready.set()

    def wake_all(self) -> None:
        """Tells everybody who waits to look again."""
        line = self.line
        for ready in [*line.waiting_alone.values(), *line.waiting.values()]:
            ready.set()

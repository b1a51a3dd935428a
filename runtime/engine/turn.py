"""Whose turn it is to run the model: one thread at a time, and no thread for longer than it drives."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST_WAIT_S = 0.1


class Turn:
    """The right to run the model, held by a token and not by a thread, so that no thread's end or reuse matters.

    It is free in a forked child, where the thread that held it does not exist.
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self.holder: object = None  # assigned None by whoever gives it back: no call that an interrupt could precede
        self._waiting: dict[object, threading.Event] = {}  # who would take it, in order of arrival
        self._mutex = threading.Lock()
        self._process = os.getpid()

    def run(self, action: Callable[[], object]) -> bool:
        """Runs an action as the holder of the turn unless somebody else has it; says whether it ran."""
        token = object()
        try:
            if not self._take(token):
                return False
            action()
            return True
        finally:
            if self.holder is token:
                self.holder = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Waits for the turn and holds it inside the `with` block."""
        token = object()
        with self.waits() as ready:
            try:
                while not self._take(token):
                    self.wait(ready)
                yield
            finally:
                if self.holder is token:
                    self.holder = None

    @contextmanager
    def waits(self, ready: threading.Event | None = None) -> Iterator[threading.Event]:
        """Registers an event, one of its own by default, which is set when its waiter should look again."""
        ready, token = ready or threading.Event(), object()
        try:
            self._waiting[token] = ready
            yield ready
        finally:
            self._waiting.pop(token, None)
            self.wake_next()

    def wait(self, ready: threading.Event) -> None:
        """Waits for an event and clears it. Not for ever, since an interrupt may have come before a `wake_next`."""
        ready.wait(LONGEST_WAIT_S)
        ready.clear()

    def wake_next(self) -> None:
        """Tells the first of those who wait that the turn is free, if it is."""
        if self.holder is None:
            for ready in list(self._waiting.values())[:1]:
                ready.set()

    def wake_all(self) -> None:
        """Tells everybody who waits to look again."""
        for ready in list(self._waiting.values()):
            ready.set()

    def _take(self, token: object) -> bool:
        if self._process != os.getpid():
            waiting = self._waiting
            self._renew()
            self._waiting = waiting  # what has been registered here; a thread that is not there never looks
        with self._mutex:
            if self.holder is None:
                self.holder = token
        return self.holder is token

"""Whose turn it is on a model: one request runs at a time, the others wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.errors import ModelBusy


class Turn:
    """A lock that knows its holder, because a request may stay open for long: a stream holds the model until it is
    exhausted or closed, and the same thread asking again would wait for itself.

    It may be released from another thread than took it, as happens when a stream is handed over or collected. A forked
    child starts with a free one: the thread that holds it is not there to release it.
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._process = os.getpid()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the model, and have it inside the `with` block.

        Raises:
            ModelBusy: this very thread holds it, by a stream it has not finished.
        """
        if self._process != os.getpid():
            self._renew()
        if self._holder == threading.get_ident() and self._lock.locked():
            raise ModelBusy(
                "this thread has an unfinished stream on the model: read it to its end or close() it before the "
                "next call"
            )
        lock = self._lock  # a stream that a fork has copied lets go of the lock that it took, not of a later one
        with lock:  # of itself, so that no interrupt comes between taking it and being bound to release it
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                if lock is self._lock:
                    self._holder = None

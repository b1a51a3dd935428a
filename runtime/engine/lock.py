"""The lock of a model: one request runs at a time, the others wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.errors import ModelBusy


class RequestLock:
    """A lock that knows its holder: a stream holds the model until it is exhausted or closed, and a second request from
    the same thread would deadlock.

    Any thread may release it, as happens when a stream is handed over or collected. It is free in a forked child, where
    the thread that held it does not exist.
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._process = os.getpid()

    @property
    def is_held(self) -> bool:
        return self._process == os.getpid() and self._lock.locked()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock, and hold it inside the `with` block.

        Raises:
            ModelBusy: this very thread holds it, by an unfinished stream.
        """
        if self._process != os.getpid():
            self._renew()
        if self._holder == threading.get_ident() and self._lock.locked():
            raise ModelBusy(
                "this thread has an unfinished stream on the model: read it to its end or close() it before the "
                "next call"
            )
        lock = self._lock  # a stream copied by a fork releases the lock that it acquired, not the child's new one
        with lock:  # the lock's own `with`: no interrupt can come between acquiring it and the duty to release it
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                if lock is self._lock:
                    self._holder = None

"""Whose turn it is on a model: one request runs at a time, the others wait."""

from __future__ import annotations

import threading
from typing import Any

from runtime.errors import ModelBusy


class Turn:
    """A lock that knows its holder, because a request may stay open for long: a stream holds the model until it is
    exhausted or closed, and the same thread asking again would wait for itself.

    Used as `with turn:`. It may be released from another thread than took it, as happens when a stream is handed over
    or collected.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        """Wait for the model.

        Raises:
            RuntimeError: this very thread holds it, by a stream it has not finished.
        """
        if self._holder == threading.get_ident():
            raise ModelBusy(
                "this thread has an unfinished stream on the model: read it to its end or close() it before the "
                "next call"
            )
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *error: Any) -> None:
        self._holder = None
        self._lock.release()

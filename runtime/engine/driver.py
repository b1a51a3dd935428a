"""A background thread that takes a model's steps while there are streams, and delivers what each step brings."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runtime.engine.answer import Call
from runtime.engine.result import Piece
from runtime.engine.scheduler import scheduler_of
from runtime.engine.stream import Stream
from runtime.model.model import Model

_log = logging.getLogger("gemma_runtime")


class Delivery(NamedTuple):
    """What a step brought to one stream. The last one carries the error that ended the stream, if there was one."""

    stream: Stream
    pieces: Sequence[Piece]
    is_last: bool
    error: Exception | None = None


class Driver:
    """Takes a model's steps in a thread of its own while any of its streams is unfinished, and yields the turn to
    others who run the model.

    Args:
        model: the model whose steps are taken.
        deliver: called in that thread after each step with what it brought, all streams at once. It must not block,
            since the next step waits for it.
    """

    def __init__(self, model: Model, deliver: Callable[[list[Delivery]], None]) -> None:
        self._model, self._deliver = model, deliver
        self._call = Call()  # no answer's own, so an error in a prompt goes to that prompt's stream
        self._ready = self._call.ready  # set with every piece, end and new stream
        self._streams: dict[Stream, None] = {}  # in order of arrival
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="gemma-runtime driver", daemon=True)
        self._thread.start()

    def submit(self, stream: Stream) -> None:
        """Takes on a stream that nobody else reads; any thread may call this.

        Raises:
            ModelClosed: the model has been closed.
        """
        stream.announce_at(self._ready)
        stream.submit()
        self._streams[stream] = None
        self._ready.set()

    def close(self) -> None:
        """Cancels unfinished streams, and ends the thread after the step under way."""
        for stream in tuple(self._streams):
            stream.cancel()
        self._is_closed = True
        self._ready.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closed:
            if not self._streams:
                self._ready.wait()
                self._ready.clear()
                continue
            try:
                scheduler_of(self._model).drive(self._call, self._has_news)
            except Exception as error:
                _log.exception("%s: a step failed", self._model.name)
                self._fail(error)
            self._hand_out()
        self._hand_out()

    def _has_news(self) -> bool:
        return self._is_closed or any(stream.has_news for stream in tuple(self._streams))

    def _hand_out(self) -> None:
        deliveries = []
        for stream in tuple(self._streams):
            pieces, is_last = stream.take()
            if pieces or is_last:
                deliveries.append(Delivery(stream, pieces, is_last, stream.failure if is_last else None))
            if is_last:
                del self._streams[stream]
        if deliveries:
            self._deliver(deliveries)

    def _fail(self, error: Exception) -> None:
        """Ends every stream with an error that none of them caused."""
        ended = tuple(self._streams)
        for stream in ended:
            del self._streams[stream]
            stream.close()
        self._deliver([Delivery(stream, (), True, error) for stream in ended])

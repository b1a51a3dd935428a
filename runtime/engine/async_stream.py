"""A stream for asyncio: read in a thread of its own, which takes steps for everybody while nobody else does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from runtime.engine.result import GenerationResult, Piece
from runtime.engine.stream import Stream


class AsyncStream:
    """The pieces of one request as they come, for `async for`; `results` as those of a Stream.

    Leaving its `async with` block ends the request, and so does cancelling the task that waits for a piece or dropping
    the last reference to this object.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._arrived: asyncio.Queue[Piece | BaseException | None] | None = None  # None after the last piece

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._arrived is None:
            self._arrived = asyncio.Queue()
            # The thread keeps the stream alive but not this object, so that dropping this object is noticed.
            arguments = self._stream, asyncio.get_running_loop(), self._arrived.put_nowait
            threading.Thread(target=_read, args=arguments, name="gemma-runtime stream", daemon=True).start()
        try:
            arrived = await self._arrived.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(arrived, Piece):
            return arrived
        self._arrived.put_nowait(None)  # for whoever asks again
        raise StopAsyncIteration if arrived is None else arrived

    def __del__(self) -> None:
        if stream := vars(self).get("_stream"):
            stream.abandon()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    async def aclose(self) -> None:
        """End the request where it stands, and read no more of it."""
        self._stream.close()

    def cancel(self) -> None:
        """As `Stream.cancel`."""
        self._stream.cancel()

    @property
    def results(self) -> list[GenerationResult]:
        return self._stream.results

    @property
    def is_list(self) -> bool:
        return self._stream.request.is_list


def _read(stream: Stream, loop: asyncio.AbstractEventLoop, put: Callable[[Piece | BaseException | None], None]) -> None:
    end: BaseException | None = None
    try:
        for piece in stream:
            loop.call_soon_threadsafe(put, piece)
    except BaseException as error:
        end = error
    finally:
        stream.close()
        try:
            loop.call_soon_threadsafe(put, end)
        except RuntimeError:  # the loop has been closed, and nobody waits
            pass

"""One request under way: its pieces as they arrive, until the last or until its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from sse_starlette import EventSourceResponse
from starlette.datastructures import State
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from runtime.engine.driver import Delivery
from runtime.engine.result import Piece
from runtime.engine.stream import Stream
from runtime.serve.error import SERVER, ApiError
from runtime.serve.usage import usage_of


class ClientGone(Exception):
    """The client has disconnected: nobody waits for the response any more."""


class Answering:
    """One of the engine's streams, read on the event loop.

    Args:
        stream: the request.
        answered: called once, when the engine is done with it.
        leave: called once, when the response is over.
    """

    def __init__(
        self, stream: Stream, answered: Callable[[], None] = lambda: None, leave: Callable[[], None] = lambda: None
    ) -> None:
        self.stream, self.answered = stream, answered
        self.is_refused = False  # cancelled because the server is shutting down
        self._leave: Callable[[], None] | None = leave
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()  # bounded by the answers' lengths

    def arrive(self, delivery: Delivery) -> None:
        self._arrived.put_nowait(delivery)

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces in turn, those already delivered and those still to come.

        Raises:
            ApiError: the request timed out, or the server is shutting down.
            Exception: the error that the engine ended the request with.
        """
        while True:
            delivery = await self._arrived.get()
            for piece in delivery.pieces:
                yield piece
            if delivery.is_last:
                break
        if delivery.error is not None:
            raise delivery.error
        if self.is_refused:
            raise ApiError(503, "the server is shutting down", SERVER, code="shutting_down")
        if any(result.finish_reason == "cancelled" for result in self.stream.results):
            raise ApiError(504, f"not answered within {self.stream.request.timeout:g} seconds", SERVER, code="timeout")

    async def finish(self, request: Request) -> list[Piece]:
        """All pieces, once the last has arrived.

        Raises:
            ClientGone: the client disconnected before the last.
            ApiError, Exception: as `pieces`.
        """
        reading = asyncio.ensure_future(_all(self.pieces()))
        watching = asyncio.ensure_future(_disconnect(request.receive))
        try:
            await asyncio.wait((reading, watching), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise ClientGone
        finally:
            reading.cancel()
            watching.cancel()

    def close(self) -> None:
        """The response is over: whatever the engine still does for it ends within a step."""
        if self._leave is not None:
            leave, self._leave = self._leave, None
            self.stream.cancel()
            leave()

    def count(self, state: State) -> None:
        """Stores the request's token counts for its line in the log."""
        usage = usage_of(self.stream)
        state.prompt_tokens, state.new_tokens = usage.prompt_tokens, usage.completion_tokens


class EventStream(EventSourceResponse):
    """Server-sent events that close their request, however they end."""

    def __init__(self, answering: Answering, events: AsyncIterator[str], state: State) -> None:
        super().__init__(events, sep="\n")
        self._answering, self._state = answering, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.close()
            self._answering.count(self._state)


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def by_answer(pieces: Iterable[Piece], answers: int) -> list[list[Piece]]:
    """Pieces grouped by answer."""
    sorted_out: list[list[Piece]] = [[] for _ in range(answers)]
    for piece in pieces:
        sorted_out[piece.index].append(piece)
    return sorted_out

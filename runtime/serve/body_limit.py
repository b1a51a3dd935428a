"""Limits on a request's body: its size, the time it may take to arrive, and no compression."""

from __future__ import annotations

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.error import ApiError

MOST_BYTES = 4 << 20
MOST_S = 30.0


class BodyLimit:
    """Refuses bodies that are compressed or too large, with or without a Content-Length, and clients that do not send
    the body in time."""

    def __init__(self, app: ASGIApp, most_bytes: int = MOST_BYTES, most_s: float = MOST_S) -> None:
        self._app, self._most_bytes, self._most_s = app, most_bytes, most_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = f"a body must be at most {self._most_bytes} bytes"
        headers = Headers(scope=scope)
        announced, encoding = headers.get("content-length", ""), headers.get("content-encoding", "identity")
        refusal = None
        if announced.isdecimal() and int(announced) > self._most_bytes:
            refusal = ApiError(413, f"{too_large}, got {announced}", code="body_too_large")
        elif encoding.lower() != "identity":
            message = f"a body must come as it is, without Content-Encoding, got {encoding!r:.40}"
            refusal = ApiError(415, message, code="unsupported_encoding")
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        size, is_whole, deadline_s = 0, False, anyio.current_time() + self._most_s

        async def receive_within_limits() -> Message:
            nonlocal size, is_whole
            if is_whole:  # only the client's disconnect can follow
                return await receive()
            with anyio.move_on_after(deadline_s - anyio.current_time()) as scope_:
                message = await receive()
            if scope_.cancelled_caught:
                raise HTTPException(408, f"the body must come within {self._most_s:g} seconds")
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > self._most_bytes:
                raise HTTPException(413, too_large)
            return message

        await self._app(scope, receive_within_limits, send)

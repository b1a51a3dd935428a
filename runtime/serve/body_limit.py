"""How large a body may be, how long it may take to come, and that it is not compressed."""

from __future__ import annotations

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.error import ApiError

MOST_BYTES = 4 << 20
MOST_S = 30.0


class BodyLimit:
    """Refuses bodies that are too large, announced or not, or compressed, and clients that do not send what they
    announced."""

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
            if is_whole:  # what follows is the client's leaving
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

"""Who may use a server that has a key."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.serve import web_page
from runtime.serve.error import ApiError

OPEN = ("/health", "/ready", *web_page.PATHS)  # for supervisors, and the page that asks for the key


class Access:
    """Refuses requests without the key, which is compared in constant time."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN and not self._is_right(scope):
            message = "this server needs its API key, as the header Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            refusal = ApiError(401, message, code="invalid_api_key", headers=headers).response()
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_right(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return hmac.compare_digest(key.strip().encode("latin-1"), self._key) and scheme.lower() == "bearer"

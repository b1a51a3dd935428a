"""The server's own outermost layer: each response has a request id and a log line, and never a traceback."""

from __future__ import annotations

import logging
import re
import time
import urllib.parse
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.error import api_error
from runtime.serve.metrics import Metrics

_log = logging.getLogger("gemma_runtime")

HEADER = "x-request-id"
_SANE = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_QUIET = ("/health", "/ready", "/metrics")  # asked every few seconds
GONE = 499  # in the log: the client closed its connection; nginx's number


class RequestLog:
    """Gives each request an id, the client's own where it is well-formed, and logs the outcome."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _SANE.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        began_s, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            response = api_error(error).response()
            if status:  # a response has begun: too late for another
                raise
            await response(scope, receive, send_with_id)
        finally:
            self._note(scope, request_id, status or GONE, time.perf_counter() - began_s)

    def _note(self, scope: Scope, request_id: str, status: int, took_s: float) -> None:
        route = scope.get("route")
        self._metrics.responded(getattr(route, "path", "other"), status)
        level = logging.DEBUG if scope["path"] in _QUIET and status == 200 else logging.INFO
        path, state = urllib.parse.quote(scope["path"]), scope["state"]
        said = f" prompt={state['prompt_tokens']} new={state['new_tokens']}" if "new_tokens" in state else ""
        if refusal := state.get("refusal"):
            said += f" {urllib.parse.quote(refusal, safe=' []')}"
        _log.log(level, "%s %s %d %.3fs%s id=%s", scope["method"], path, status, took_s, said, request_id)

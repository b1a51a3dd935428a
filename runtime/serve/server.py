"""The process: uvicorn's server, which drains on SIGTERM and does not wait for silent clients."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.api import Model
from runtime.errors import InvalidArgument
from runtime.serve.app import application
from runtime.serve.error import ApiError
from runtime.serve.service import Service, Settings

_log = logging.getLogger("gemma_runtime")

HEADERS_TIMEOUT_S = 30.0
READ_TIMEOUT_S = 30.0  # while the write buffer is full
LEFT_TO_WRITE_S = 5  # to send responses whose answers are complete or refused


class Connection(H11Protocol):
    """uvicorn's HTTP connection, with timeouts for a first request's headers and for a client that does not read, and a
    JSON error for invalid HTTP. uvicorn itself waits for ever, and refuses in plain text."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._headers = self.loop.call_later(HEADERS_TIMEOUT_S, self._end_without_request)
        self._reader: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers.cancel()
        self._forget_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._reader = self.loop.call_later(READ_TIMEOUT_S, self._end_without_reader)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._forget_reader()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no response has begun
            refusal = ApiError(400, "this is no request of HTTP/1.1", code="invalid_http").response()
            headers = [*refusal.raw_headers, (b"connection", b"close")]
            start = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (start, h11.Data(data=bytes(refusal.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _forget_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()

    def _end_without_request(self) -> None:
        if self.cycle is None:
            self.transport.close()

    def _end_without_reader(self) -> None:
        _log.info("a client has not read for %g seconds: its connection is closed", READ_TIMEOUT_S)
        self.transport.abort()  # the client will not take the rest


class Server(uvicorn.Server):
    """Shuts down in stages: from the first SIGTERM or Ctrl-C on, new requests get 503 while those under way go on, and
    the server exits once they are done or `drain_s` is over. A second signal ends those under way, and a third waits
    for nothing.

    Args:
        config: uvicorn's.
        service: what runs requests.
        drain_s: seconds for requests under way.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service, self._drain_s = service, drain_s
        self._ends_at: float | None = None  # of time.monotonic

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A signal may arrive in the middle of anything, so this only leaves a note for the next tick.
        if self._ends_at is None:
            self._service.admission.is_draining = True
            self._ends_at = time.monotonic() + self._drain_s
            _log.info("draining: %d responses under way", self._service.admission.responses)
        elif self._ends_at:
            self._ends_at = 0.0
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._ends_at is not None and not self.should_exit:
            is_late = time.monotonic() > self._ends_at
            if is_late:
                self._service.refuse()
            self.should_exit = is_late or not self._service.admission.responses
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket to an address, without listening yet.

    Raises:
        InvalidArgument: the address cannot be bound.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        raise InvalidArgument(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error
    return taken


def serve(model: Model, settings: Settings, address: socket.socket, drain_s: float) -> None:
    """Serves a model until the process is asked to end.

    Args:
        model: loaded.
        settings: how the server behaves.
        address: where to listen, from `bind`.
        drain_s: seconds that requests under way have once the process is asked to end.

    Raises:
        InvalidArgument: the model has no tokenizer.
    """
    app = application(model, settings)
    config = uvicorn.Config(
        app,
        http=Connection,
        loop="asyncio",  # even where uvloop is installed
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LEFT_TO_WRITE_S,
    )
    host, port = address.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _log.info("%s: %d rows, serving at http://%s:%d", settings.names[0], model.runtime.max_batch, shown, port)
    Server(config, app.state.service, drain_s).run(sockets=[address])

"""Strict JSON: NaN, Infinity and numbers beyond a float's range, which Python would read, are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from runtime.errors import one_line


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {digits:.20} is beyond a float's range")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def read_json(text: str | bytes) -> Any:
    """The value of a text that is one JSON value.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def begin_json(text: str) -> tuple[Any, int]:
    """The value that a text begins with, and where it ends.

    Raises:
        ValueError: as `read_json`.
    """
    try:
        return _DECODER.raw_decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


class StrictRequest(Request):
    """A request whose body is read by `read_json`."""

    async def json(self) -> Any:
        try:
            return read_json(await self.body())
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # FastAPI handles JSONDecodeError alone
            raise json.JSONDecodeError(one_line(error), "", 0) from error


class StrictRoute(APIRoute):
    """A path whose bodies are strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle

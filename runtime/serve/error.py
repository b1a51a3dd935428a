"""The errors that requests get, in the shape of OpenAI's API."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from runtime.engine.options import StreamOptions
from runtime.errors import (
    GemmaRuntimeError,
    GrammarTooComplex,
    InvalidArgument,
    InvalidArgumentType,
    MissingPackage,
    NonFiniteError,
    one_line,
)

_log = logging.getLogger("gemma_runtime")

MOST_OF_PARAM, MOST_OF_MESSAGE = 80, 1000  # characters
INVALID = "invalid_request_error"
SERVER = "server_error"
# The engine's name for an option, and the API's.
_API_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_FIELD = re.compile("(?!str$|int$)[a-z_]+")  # not the names that pydantic gives the forms of a union
_OPTION = re.compile(rf"\b({'|'.join(('prompt', *StreamOptions.__annotations__, *_API_NAMES.values()))})\b")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """A refusal, or a failure that is reported to the client.

    Args:
        status: the HTTP status.
        message: one line, with what was expected and what was given.
        kind: OpenAI's `type`.
        param: the field at fault.
        code: OpenAI's `code`, for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        param = None if param is None else _valid(param, MOST_OF_PARAM)
        message = _valid(message, MOST_OF_MESSAGE)
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def _valid(text: str, most: int) -> str:
    """Text that UTF-8 can encode, cut to `most` characters: a client's may hold lone surrogates, or megabytes."""
    return (text if len(text) <= most else f"{text[:most]}...").encode(errors="backslashreplace").decode()


def api_error(error: BaseException) -> ApiError:
    """What a client is told about an error: its message where it is meant for callers, and no details of any other."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidArgument | InvalidArgumentType | GrammarTooComplex | MissingPackage):
        message = one_line(error)
        for ours, theirs in _API_NAMES.items():
            message = message.replace(ours, theirs)
        named = _OPTION.search(message)
        return ApiError(400, message, param=named.group() if named else None)
    if isinstance(error, NonFiniteError):
        return ApiError(500, one_line(error), SERVER, code="non_finite")
    if isinstance(error, HTTPException):
        return _of_http(error)
    if not isinstance(error, GemmaRuntimeError):
        _log.error("internal error", exc_info=error)
    return ApiError(500, "the server failed to answer this request; its log says why", SERVER, code="internal_error")


_CODES = {404: "unknown_url", 405: "method_not_allowed", 408: "body_too_late", 413: "body_too_large"}
_MESSAGES = {404: "there is no such path", 405: "this path does not take this method"}


def _of_http(error: HTTPException) -> ApiError:
    status = error.status_code
    message = _MESSAGES.get(status, str(error.detail))
    return ApiError(status, message, code=_CODES.get(status), headers=error.headers)


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """The first error in a body; for a field that takes several forms, the error that lies deepest."""
    field = errors[0]["loc"][:2]
    first = max((error for error in errors if error["loc"][:2] == field), key=lambda error: len(error["loc"]))
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    *path, last = first["loc"][1:] or (0,)
    parts = [part for part in path if isinstance(part, int) or _FIELD.fullmatch(part)]
    if kind == "extra_forbidden" or (len(first["loc"]) > 1 and (isinstance(last, int) or _FIELD.fullmatch(last))):
        parts.append(last)
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".") or None
    if kind == "json_invalid":
        return ApiError(
            400, f"the body must be JSON: {first.get('ctx', {}).get('error', message)}", code="invalid_json"
        )
    if kind == "extra_forbidden":
        param = param or ""
        return ApiError(
            400, f"there is no field {param or repr(param):.80} here", param=param, code="unknown_parameter"
        )
    if param is None and kind == "string_unicode":
        return ApiError(400, "there is no field here whose name is not valid Unicode", code="unknown_parameter")
    if param is None:
        return ApiError(400, "the body must be a JSON object, with the header Content-Type: application/json")
    given = "" if kind in ("missing", "value_error") else f", got {_shown(first.get('input'))}"
    return ApiError(400, f"{param}: {message[:1].lower()}{message[1:]}{given}", param=param)


def _shown(value: Any) -> str:
    shown = one_line(repr(value))
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _refusal(request: Request, error: ApiError) -> JSONResponse:
    """The response; the log gets its code and field alone, none of the client's text."""
    detail = error.body.error
    request.state.refusal = " ".join(filter(None, (detail.code, detail.param)))
    return error.response()


def add_handlers(app: FastAPI) -> None:
    """Makes an application answer with these errors in place of its framework's."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(request, _of_validation(error.errors()))

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _refusal(request, api_error(error))

    for kind in (ApiError, HTTPException, GemmaRuntimeError):
        app.add_exception_handler(kind, failed)

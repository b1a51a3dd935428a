"""The application: every path, and the layers around them.

A request passes the log, which gives it an id, then the key check and the body's limits. Its body is validated in full,
its prompt is tokenised in a thread, and the driver's thread runs the engine's steps. The answer is sent as it is
generated, or as one object at the end.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from runtime.api import Model
from runtime.serve.access import Access
from runtime.serve.answering import ClientGone, EventStream
from runtime.serve.body_limit import BodyLimit
from runtime.serve.chat import Chat, ChatAnswer
from runtime.serve.chat_request import ChatRequest
from runtime.serve.completion import Completion, CompletionAnswer, CompletionRequest
from runtime.serve.error import SERVER, ApiError, ErrorBody, add_handlers
from runtime.serve.inspector import Attention, AttentionRequest, Inspector, ModelFacts
from runtime.serve.request_log import GONE, RequestLog
from runtime.serve.service import Service, Settings, Work
from runtime.serve.strict_json import StrictRoute
from runtime.serve.tokens import (
    Detokenized,
    DetokenizeRequest,
    TokenizeRequest,
    Tokens,
    detokenize,
    tokenize,
)
from runtime.serve.web_page import add_web_page

VERSION = importlib.metadata.version("gemma-runtime")
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "One object, or with stream: true its parts."},
    **_ERRORS,
}


class ModelCard(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "gemma-runtime"
    max_model_len: int


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]


class Version(BaseModel):
    version: str


class Status(BaseModel):
    status: str


class _Asked(Protocol):
    """A body that asks something of the engine."""

    model: str | None
    stream: bool | None

    def work(self, service: Service) -> Work: ...


def application(model: Model, settings: Settings) -> FastAPI:
    """The server's application; its `state.service` runs requests.

    Raises:
        InvalidArgument: the model has no tokenizer.
    """
    service = Service(model, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="gemma-runtime",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # the client's Host would choose the target, and some clients change the method
        responses=_ERRORS,
    )
    app.router.route_class = StrictRoute
    app.state.service = service
    add_handlers(app)
    _add_paths(app, service)
    _add_inspector(app, service)
    add_web_page(app)
    _name_models(app, settings.names)
    _answer_head(app)
    app.add_middleware(BodyLimit)
    if settings.api_key is not None:
        app.add_middleware(Access, api_key=settings.api_key)
    app.add_middleware(RequestLog, metrics=service.metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    return app


def _add_paths(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=Completion, responses=_STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(service, body, request, CompletionAnswer)

    @app.post("/v1/chat/completions", response_model=Chat, responses=_STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(service, body, request, ChatAnswer)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[_card(service, name) for name in service.settings.names])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        _check_model(service, name)
        return _card(service, name)

    @app.post("/tokenize", response_model_exclude_none=True)
    async def tokens_of(body: TokenizeRequest) -> Tokens:
        _check_model(service, body.model)
        return await tokenize(service, body)

    @app.post("/detokenize")
    async def text_of(body: DetokenizeRequest) -> Detokenized:
        _check_model(service, body.model)
        return await detokenize(service, body)

    @app.get("/health")
    async def health() -> Status:
        return Status(status="ok")

    @app.get("/ready")
    async def ready() -> Status:
        if not service.is_ready or service.admission.is_draining:
            raise ApiError(503, "the server takes no requests now", SERVER, code="not_ready")
        return Status(status="ready")

    @app.get("/version")
    async def version() -> Version:
        return Version(version=VERSION)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=METRICS_TYPE)


def _add_inspector(app: FastAPI, service: Service) -> None:
    inspector = Inspector(service)

    @app.get("/inspect")
    async def facts() -> ModelFacts:
        return inspector.facts()

    @app.post("/inspect/attention", response_model=Attention)
    async def attention(body: AttentionRequest, request: Request) -> Response:
        _check_model(service, body.model)
        try:
            return Response(await inspector.attention(body, request), media_type="application/json")
        except ClientGone:
            return Response(status_code=GONE)


def _name_models(app: FastAPI, names: Sequence[str]) -> None:
    """Puts the model's names into the schemas of requests."""
    for schema in app.openapi()["components"]["schemas"].values():
        for form in schema.get("properties", {}).get("model", {}).get("anyOf", ()):  # in requests, where it is optional
            if form["type"] == "string":
                form["enum"] = list(names)


def _answer_head(app: FastAPI) -> None:
    """Allows HEAD wherever GET is; the ASGI server drops the body. The schema, already built, does not list it."""
    for route in app.routes:
        if isinstance(route, Route) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(id=name, created=service.started_at, max_model_len=service.context)


def _check_model(service: Service, name: str | None) -> None:
    names = service.settings.names
    if name is not None and name not in names:
        message = f"there is no model {name!r:.80} here, expected {' or '.join(map(repr, names))}"
        raise ApiError(404, message, param="model", code="model_not_found")


async def _answer(
    service: Service, body: _Asked, request: Request, kind: type[CompletionAnswer] | type[ChatAnswer]
) -> Response:
    """Admits a request and answers it, all at once or as events."""
    _check_model(service, body.model)
    answering = await service.begin(body.work(service))
    try:
        answer = kind(service, body, answering, request.state.request_id)  # type: ignore[arg-type]
        if body.stream:
            return EventStream(answering, answer.events(), request.state)
        whole = answer.whole(await answering.finish(request))
        return Response(whole.model_dump_json(exclude_unset=True), media_type="application/json")
    except ClientGone:
        return Response(status_code=GONE)
    finally:
        if not body.stream:
            answering.close()
            answering.count(request.state)

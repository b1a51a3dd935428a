"""`/inspect`: what the page at `/` needs to know about the model, and what one of its heads attends to."""

from __future__ import annotations

from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import Request
from pydantic import BaseModel, Field

from runtime.inspection.attention import attention_weights
from runtime.model.config import FAMILY_NAMES
from runtime.serve.answering import ClientGone
from runtime.serve.error import ApiError
from runtime.serve.options import Body, Token
from runtime.serve.service import Service

MOST_TOKENS = 256  # with more, a heat map shows nothing
DIGITS = 4  # decimals of a weight


class Layer(BaseModel):
    heads: int
    window: int | None = Field(description="In tokens; null where the layer attends to everything.")


class ModelFacts(BaseModel):
    """The loaded model, and what may be asked about its attention."""

    model: str
    family: str
    parameters: int
    dtype: str
    device: str
    max_model_len: int
    has_chat_template: bool
    layers: list[Layer]
    max_attention_tokens: int = MOST_TOKENS


class AttentionRequest(Body):
    model: str | None = None
    tokens: Annotated[list[Token], Field(min_length=1, max_length=MOST_TOKENS)]
    layer: Annotated[int, Field(ge=0)]
    head: Annotated[int, Field(ge=0)]


class Attention(BaseModel):
    """How much each token attends to itself and those before it: a row per token, each an entry longer than the
    last."""

    layer: int
    head: int
    window: int | None
    weights: list[list[float]]


class Inspector:
    """Inspects a server's model, and computes attention for one request at a time."""

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, anyio.Lock()

    def facts(self) -> ModelFacts:
        service, model = self._service, self._service.model
        return ModelFacts(
            model=service.name,
            family=FAMILY_NAMES[model.config.family],
            parameters=model.weights.parameters,
            dtype=model.runtime.dtype,
            device=str(model.device),
            max_model_len=service.context,
            has_chat_template=service.tokenizer.has_chat_template,
            layers=[Layer(heads=layer.heads, window=layer.window) for layer in model.config.layers],
        )

    async def attention(self, body: AttentionRequest, request: Request) -> str:
        """An `Attention` as JSON, computed in a thread between the engine's steps.

        Raises:
            ApiError: there is no such layer, head or token, or no room.
            ClientGone: the client disconnected before its turn.
        """
        self._check(body)
        admission = self._service.admission
        admission.enter(1)
        try:
            async with self._lock:
                if await request.is_disconnected():
                    raise ClientGone
                return await anyio.to_thread.run_sync(self._look, body)
        finally:
            admission.answered(1)
            admission.leave()

    def _check(self, body: AttentionRequest) -> None:
        config = self._service.model.config
        _check_below("layer", body.layer, len(config.layers))
        _check_below("head", body.head, config.layers[body.layer].heads)
        _check_below("tokens", max(body.tokens), config.vocab)
        if len(body.tokens) > self._service.context:
            message = f"tokens must fit the context of {self._service.context} tokens, got {len(body.tokens)}"
            raise ApiError(400, message, param="tokens", code="context_length_exceeded")

    def _look(self, body: AttentionRequest) -> str:
        model = self._service.model
        weights = attention_weights(model, body.tokens, body.layer, body.head)
        rows = [[round(weight, DIGITS) for weight in row[: at + 1]] for at, row in enumerate(weights.tolist())]
        window = model.config.layers[body.layer].window
        return Attention(layer=body.layer, head=body.head, window=window, weights=rows).model_dump_json()


def _check_below(field: str, value: int, end: int) -> None:
    if value >= end:
        raise ApiError(400, f"{field} must be from 0 to {end - 1}, got {value}", param=field)

"""`/tokenize` and `/detokenize`: text to ids and back, as vLLM's server has them."""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread
from pydantic import BaseModel, Field

from runtime.serve.error import ApiError
from runtime.serve.logprobs import spelled
from runtime.serve.message import Message, conversation
from runtime.serve.options import Body, Token
from runtime.serve.service import Service


class TokenizeRequest(Body):
    """Either a text or a conversation, which is rendered by the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = Field(True, description="Of a text; a conversation has those of its template.")
    return_token_strs: bool = False


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Token]


class Detokenized(BaseModel):
    prompt: str


async def tokenize(service: Service, body: TokenizeRequest) -> Tokens:
    """The ids of a text or a conversation.

    Raises:
        ApiError: not exactly one of the two is given.
        InvalidArgument: it has no ids.
    """
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "there must be either a prompt or messages", param="prompt")

    def read() -> list[int]:
        if body.messages is None:
            assert body.prompt is not None
            return service.tokenizer.encode(body.prompt, body.add_special_tokens)
        return service.tokenizer.apply_chat(conversation(body.messages))

    ids = await anyio.to_thread.run_sync(read)
    strings = [spelled(service.tokenizer, token) for token in ids] if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=service.context, tokens=ids, token_strs=strings)


async def detokenize(service: Service, body: DetokenizeRequest) -> Detokenized:
    """The text of ids, special tokens included.

    Raises:
        ApiError: there is no such id.
    """
    vocab = service.tokenizer.vocab_size
    if beyond := [token for token in body.tokens if token >= vocab]:
        raise ApiError(400, f"tokens must be below {vocab}, got {beyond[0]}", param="tokens")
    text = await anyio.to_thread.run_sync(lambda: service.tokenizer.decode(body.tokens, skip_special_tokens=False))
    return Detokenized(prompt=text)

"""What `/v1/chat/completions` answers: a message, whole or streamed, with tool calls separated from its text."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from runtime.engine.result import GenerationResult, Piece
from runtime.serve.answering import Answering, by_answer
from runtime.serve.call_format import CallFormat
from runtime.serve.call_reader import CallReader
from runtime.serve.chat_request import ChatRequest
from runtime.serve.completion import DONE, sent
from runtime.serve.error import api_error
from runtime.serve.logprobs import ChatLogprobs, chat_logprobs
from runtime.serve.message import ToolCall
from runtime.serve.service import Service
from runtime.serve.usage import Usage, usage_of

FinishReason = Literal["stop", "length", "tool_calls"]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ToolCallDelta(ToolCall):
    index: int


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """One part of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class ChatAnswer:
    """Turns a request's pieces into its response."""

    def __init__(self, service: Service, body: ChatRequest, answering: Answering, id: str) -> None:
        self._service, self._body, self._answering = service, body, answering
        self._frame: dict[str, Any] = {
            "id": f"chatcmpl-{id}",
            "created": int(time.time()),
            "model": body.model or service.name,
        }
        names = {function.name for function in body.functions}
        written: CallFormat | None = service.call_format if names else None
        most = 1 if body.parallel_tool_calls is False else None
        # One for each answer.
        self._readers = [CallReader(written, names, most) if written else None for _ in range(body.answers)]
        self._calls = [0] * body.answers
        self._new_tokens = 0
        self._hides_stops = written is not None and written.has_special_tokens and body.skip_special_tokens

    def whole(self, pieces: Sequence[Piece]) -> Chat:
        stream = self._answering.stream
        results = stream.results
        choices = [
            self._choice(index, result, sorted_out)
            for index, (result, sorted_out) in enumerate(zip(results, by_answer(pieces, len(results)), strict=True))
        ]
        ids: dict[str, Any] = (
            {"prompt_token_ids": list(stream.request.prompts[0])} if self._body.return_token_ids else {}
        )
        return Chat(object="chat.completion", choices=choices, usage=usage_of(stream), **self._frame, **ids)

    async def events(self) -> AsyncIterator[str]:
        """The data of each server-sent event."""
        body, stream = self._body, self._answering.stream
        begin: dict[str, Any] = {"prompt_token_ids": list(stream.request.prompts[0])} if body.return_token_ids else {}
        try:
            for index in range(body.answers):
                yield self._chunk(index, Delta(role="assistant", content=""), **begin)
            async for piece in self._answering.pieces():
                self._new_tokens += 1
                deltas = list(self._deltas(piece.index, self._read(piece)))
                logprobs = self._logprobs([piece])
                if not deltas and (logprobs is not None or body.return_token_ids):
                    deltas = [Delta(content="")]
                for delta in deltas:  # logprobs and ids go with the token's first delta
                    ids = piece.token_ids if body.return_token_ids and delta is deltas[0] else None
                    yield self._chunk(piece.index, delta, logprobs if delta is deltas[0] else None, token_ids=ids)
            for index, result in enumerate(stream.results):
                for delta in self._deltas(index, self._rest(index)):
                    yield self._chunk(index, delta)
                yield self._chunk(index, Delta(), reason=self._reason(index, result))
            if body.includes_usage:
                yield sent(ChatChunk(object="chat.completion.chunk", choices=[], usage=usage_of(stream), **self._frame))
            yield DONE
        except Exception as error:
            yield api_error(error).body.model_dump_json()

    def _chunk(
        self,
        index: int,
        delta: Delta,
        logprobs: ChatLogprobs | None = None,
        reason: FinishReason | None = None,
        token_ids: Iterable[int] | None = None,
        **extra: Any,
    ) -> str:
        ids = {} if token_ids is None else {"token_ids": list(token_ids)}
        extra |= self._body.usage_so_far(self._answering.stream, self._new_tokens)
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason, **ids)
        return sent(ChatChunk(object="chat.completion.chunk", choices=[choice], **self._frame, **extra))

    def _choice(self, index: int, result: GenerationResult, pieces: Sequence[Piece]) -> ChatChoice:
        said, calls = "", []
        for part in (*(part for piece in pieces for part in self._read(piece)), *self._rest(index)):
            if isinstance(part, str):
                said += part
            else:
                calls.append(part)
                self._calls[index] += 1
        message = {"tool_calls": calls, "content": said.strip() or None} if calls else {"content": said}
        ids = {"token_ids": list(result.token_ids)} if self._body.return_token_ids else {}
        return ChatChoice(
            index=index,
            message=ChatMessage(role="assistant", **message),
            logprobs=self._logprobs(pieces),
            finish_reason=self._reason(index, result),
            **ids,
        )

    def _read(self, piece: Piece) -> Iterator[str | ToolCall]:
        """The text and the calls that a piece completes."""
        text, reader = piece.text, self._readers[piece.index]
        if self._hides_stops and piece.token_ids[0] in self._service.model.config.stop_token_ids:
            text = text.removesuffix(self._service.tokenizer.decode(piece.token_ids, skip_special_tokens=False))
        if reader is not None:
            yield from reader.push(text)
        elif text:
            yield text

    def _rest(self, index: int) -> Iterator[str]:
        """The rest of an answer, which is certain to be text only at its end."""
        reader = self._readers[index]
        if reader is not None and (rest := reader.finish()):
            yield rest

    def _deltas(self, index: int, parts: Iterable[str | ToolCall]) -> Iterator[Delta]:
        for part in parts:
            if isinstance(part, str):
                yield Delta(content=part)
            else:
                call = ToolCallDelta(index=self._calls[index], id=part.id, type="function", function=part.function)
                self._calls[index] += 1
                yield Delta(tool_calls=[call])

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._service.tokenizer, [piece.logprob for piece in pieces if piece.logprob is not None])

    def _reason(self, index: int, result: GenerationResult) -> FinishReason:
        if result.finish_reason != "stop":
            return "length"
        return "tool_calls" if self._calls[index] else "stop"

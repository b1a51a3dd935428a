"""`/v1/completions`: the continuation of a text."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from runtime.engine.request import read_prompt
from runtime.engine.result import GenerationResult, Piece
from runtime.serve.answering import Answering, by_answer
from runtime.serve.error import ApiError, api_error
from runtime.serve.logprobs import CompletionLogprobs, completion_logprobs
from runtime.serve.options import MOST_LOGPROBS, AnswerOptions, Token
from runtime.serve.service import Read, Service, Work
from runtime.serve.usage import Usage, usage_of

MAX_TOKENS = 16  # OpenAI's default
DONE = "[DONE]"

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Token], Field(min_length=1)]


class CompletionRequest(AnswerOptions):
    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else list(self.prompt)  # type: ignore[list-item, arg-type]

    def work(self, service: Service) -> Work:
        """The request as work for the engine.

        Raises:
            ApiError, GemmaRuntimeError: the request cannot be run.
        """
        if self.best_of not in (None, self.answers):
            raise ApiError(400, f"best_of must be n = {self.answers} here, got {self.best_of}", param="best_of")
        if self.echo and self.stream:
            raise ApiError(400, "echo must be false in a stream", param="echo")
        options = self.for_engine()

        def read() -> Read:
            many = not isinstance(self.prompt, str) and not isinstance(self.prompt[0], int)
            prompts = [
                read_prompt(service.model, prompt, f"prompt[{index}]" if many else "prompt")
                for index, prompt in enumerate(self.prompts)
            ]
            asked = {"logprobs": self.logprobs, "prompt_logprobs": self.logprobs if self.echo else None}
            return prompts, MAX_TOKENS if self.max_tokens is None else self.max_tokens, options | asked

        return Work(len(self.prompts) * self.answers, read)


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(BaseModel):
    """A whole answer, or one part of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CompletionAnswer:
    """Turns a request's pieces into its response."""

    def __init__(self, service: Service, body: CompletionRequest, answering: Answering, id: str) -> None:
        self._service, self._body, self._answering = service, body, answering
        self._frame: dict[str, Any] = {
            "id": f"cmpl-{id}",
            "created": int(time.time()),
            "model": body.model or service.name,
        }
        self._lengths = [0] * (len(body.prompts) * body.answers)  # characters sent, by answer

    def whole(self, pieces: Sequence[Piece]) -> Completion:
        results = self._answering.stream.results
        choices = [
            self._choice(index, result, sorted_out)
            for index, (result, sorted_out) in enumerate(zip(results, by_answer(pieces, len(results)), strict=True))
        ]
        return self._chunk(choices, usage=usage_of(self._answering.stream))

    async def events(self) -> AsyncIterator[str]:
        """The data of each server-sent event."""
        body, stream, new_tokens = self._body, self._answering.stream, 0
        try:
            async for piece in self._answering.pieces():
                new_tokens += 1
                extra = body.usage_so_far(stream, new_tokens)
                if piece.text or body.logprobs is not None or body.return_token_ids:
                    yield sent(self._chunk([self._piece(piece)], **extra))
            extra = body.usage_so_far(stream, new_tokens)
            for index, result in enumerate(stream.results):
                last: dict[str, Any] = {"finish_reason": result.finish_reason}
                if body.return_token_ids:
                    last |= {"token_ids": [], "prompt_token_ids": list(result.prompt_token_ids)}
                yield sent(self._chunk([CompletionChoice(index=index, text="", logprobs=None, **last)], **extra))
            if body.includes_usage:
                yield sent(self._chunk([], usage=usage_of(stream)))
            yield DONE
        except Exception as error:
            yield api_error(error).body.model_dump_json()

    def _chunk(self, choices: list[CompletionChoice], **extra: Any) -> Completion:
        return Completion(object="text_completion", choices=choices, **self._frame, **extra)

    def _piece(self, piece: Piece) -> CompletionChoice:
        index, logprobs = piece.index, None
        if piece.logprob is not None:
            logprobs = completion_logprobs(
                self._service.tokenizer,
                [(piece.token_ids[0], piece.logprob, piece.text)],
                self._body.logprobs or 0,
                self._lengths[index],
                self._body.return_token_ids,
            )
        self._lengths[index] += len(piece.text)
        ids = {"token_ids": list(piece.token_ids)} if self._body.return_token_ids else {}
        return CompletionChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=None, **ids)

    def _choice(self, index: int, result: GenerationResult, pieces: Sequence[Piece]) -> CompletionChoice:
        body, tokenizer = self._body, self._service.tokenizer
        tokens = [(piece.token_ids[0], piece.logprob, piece.text) for piece in pieces]
        text = result.text
        if body.echo:
            decoder = tokenizer.incremental(body.skip_special_tokens)
            known = result.prompt_logprobs or [None] * len(result.prompt_token_ids)
            prompt = [
                (token, logprob, decoder.push(token))
                for token, logprob in zip(result.prompt_token_ids, known, strict=True)
            ]
            text = "".join(piece for _, _, piece in prompt) + decoder.finish() + text
            tokens = [*prompt, *tokens]
        logprobs = None
        if body.logprobs is not None:
            logprobs = completion_logprobs(tokenizer, tokens, body.logprobs, with_ids=body.return_token_ids)
        ids: dict[str, Any] = {}
        if body.return_token_ids:
            ids = {"token_ids": list(result.token_ids), "prompt_token_ids": list(result.prompt_token_ids)}
        return CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=_reason(result.finish_reason), **ids
        )


def _reason(reason: str | None) -> Literal["stop", "length"] | None:
    return "stop" if reason == "stop" else "length"


def sent(chunk: BaseModel) -> str:
    return chunk.model_dump_json(exclude_unset=True)

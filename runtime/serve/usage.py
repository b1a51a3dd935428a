"""How many tokens a request took, in OpenAI's shape."""

from __future__ import annotations

from pydantic import BaseModel

from runtime.engine.stream import Stream


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts, each counted once whatever `n` is, and of all answers, stop tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(stream: Stream, new_tokens: int | None = None) -> Usage:
    """The tokens that a request has used so far; `new_tokens`, if given, replaces the count of new ones."""
    prompt = sum(map(len, stream.request.prompts))
    new = sum(len(result.token_ids) for result in stream.results) if new_tokens is None else new_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=stream.cached_tokens),
    )

"""Log probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel

from runtime.sampling.logprobs import TokenLogprob
from runtime.text.tokenizer import Tokenizer


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """An entry for each token of a chat message, including the one that ended it."""

    content: list[ChatLogprob]


class CompletionLogprobs(BaseModel):
    """A completion's tokens, in one list for each fact; the first token of a prompt has no probability."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    top_token_ids: list[dict[str, int] | None] | None = None  # keyed by the same texts


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> ChatLogprobs:
    content = [
        ChatLogprob(
            **_entry(tokenizer, one.token_id, one.logprob).model_dump(),
            top_logprobs=[_entry(tokenizer, token, logprob) for token, logprob in one.top],
        )
        for one in logprobs
    ]
    return ChatLogprobs(content=content)


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    token_bytes = tokenizer.bytes_of(token)
    text = (token_bytes or b"").decode(errors="replace")
    return TopLogprob(token=text, logprob=logprob, bytes=None if token_bytes is None else list(token_bytes))


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Iterable[tuple[int, TokenLogprob | None, str]],
    top: int,
    offset: int = 0,
    with_ids: bool = False,
) -> CompletionLogprobs:
    """The log probabilities of some tokens, one list for each fact.

    Args:
        tokenizer: the model's.
        tokens: each one's id, its log probability where known, and the text that it adds.
        top: how many alternatives were asked for at each token.
        offset: characters of text before the first token.
        with_ids: whether the ids of the alternatives are wanted too.
    """
    columns = CompletionLogprobs(text_offset=[], tokens=[], token_logprobs=[], top_logprobs=[])
    ids: list[dict[str, int] | None] = []
    for token, known, text in tokens:
        columns.text_offset.append(offset)
        columns.tokens.append(spelled(tokenizer, token))
        columns.token_logprobs.append(known.logprob if known else None)
        likeliest = {spelled(tokenizer, other): logprob for other, logprob in known.top} if known else None
        columns.top_logprobs.append(likeliest if top else None)
        ids.append({spelled(tokenizer, other): other for other, _ in known.top} if known and top else None)
        offset += len(text)
    if with_ids:
        columns.top_token_ids = ids
    return columns


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; bytes that are not text on their own are spelled as OpenAI does, so that no two look alike."""
    token_bytes = tokenizer.bytes_of(token) or b""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

"""The options that completions and chats share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.engine.stream import Stream
from runtime.serve.error import ApiError
from runtime.serve.usage import Usage, usage_of

MOST_LOGPROBS = 20
Token = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """A request's body: unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="As in vLLM: every part has the usage so far.")


class AnswerOptions(Body):
    """The fields of both kinds of request. What OpenAI's API does not have is named as in vLLM; `reuse` and `speculate`
    are this runtime's own."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="0, the default, picks the likeliest token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = Field(None, description="Has no effect on an answer.")

    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = Field(
        False,
        description="Adds token_ids to every choice, and prompt_token_ids; to a completion's logprobs top_token_ids.",
    )
    reuse: bool = True
    speculate: Literal["prompt"] | None = None

    @property
    def answers(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def usage_so_far(self, stream: Stream, new_tokens: int) -> dict[str, Usage | None]:
        """The usage field of one part of a stream; empty where it was not asked for."""
        if not self.includes_usage:
            return {}
        assert self.stream_options is not None
        return {"usage": usage_of(stream, new_tokens) if self.stream_options.continuous_usage_stats else None}

    def for_engine(self) -> dict[str, Any]:
        """These fields as options of `runtime.generate`, except the length and log probabilities.

        Raises:
            ApiError: two fields contradict each other, or a key of logit_bias is not a token id.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        return {
            "n": self.answers,
            "stop": self.stop,
            "seed": self.seed,
            "temperature": self.temperature or 0.0,
            "top_p": self.top_p,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": _bias(self.logit_bias),
            "response_format": self.response_format,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens,
            "stop_token_ids": self.stop_token_ids or [],
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "reuse": self.reuse,
            "speculate": self.speculate,
        }


def _bias(given: dict[str, float] | None) -> dict[int, float] | None:
    """Biases by token id. JSON's keys are text, and each id has only one spelling that is accepted."""
    for key in given or {}:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and key == str(int(key))):
            raise ApiError(400, f"logit_bias must have token ids as keys, got {key!r:.40}", param="logit_bias")
    return {int(key): bias for key, bias in given.items()} if given else None

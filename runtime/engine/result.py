"""What a request gives back: pieces while it runs, a result with its numbers when it is done."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import Any, Literal

from runtime.sampling.logprobs import TokenLogprob

FinishReason = Literal["stop", "length", "cancelled"]
_SHOWN_IDS = 8  # of a result's, where it is displayed


@dataclass(frozen=True)
class Piece:
    """What one new token adds to the text.

    `text` may be empty (a special token, the first bytes of a character, or what may be the start of a stop string) and
    is never a broken character. `index` is the row of the batch, 0 for a single prompt; with `n` answers per prompt, a
    row's first answer has `n * row`. `logprob` is set if log probabilities were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Stats:
    """The numbers of one call, over all rows of its batch.

    `ttft_s` is the time from the call until every row that begins with it has its first token; tokenisation, waiting
    for other callers and, in a model's first call, compiling its kernels are left out. `decode_s` is the time after
    that, as the caller saw it: a slow reader of a stream slows it down, and so do other calls. Each step reads every
    weight once for all rows, so `bytes_per_token` shrinks with the batch and with speculation. `cached_tokens` counts
    prompt tokens that were reused from earlier prompts. A figure is None where there was nothing to measure.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_s: float | None = None
    decode_s: float | None = None
    decode_tokens_per_s: float | None = None
    bytes_per_token: int | None = None
    bandwidth_gb_s: float | None = None
    cached_tokens: int = 0

    def __str__(self) -> str:
        figures = [f"{self.prompt_tokens} prompt + {self.new_tokens} new tokens"]
        if self.ttft_s is not None:
            figures.append(f"first token {self.ttft_s * 1e3:,.0f} ms")
        if self.decode_tokens_per_s is not None:
            figures.append(f"{self.decode_tokens_per_s:,.1f} tokens/s")
        if self.bandwidth_gb_s is not None and self.bytes_per_token is not None:
            figures.append(f"{self.bandwidth_gb_s:,.1f} GB/s ({self.bytes_per_token / 1e6:,.0f} MB per token)")
        return " · ".join(figures)


@dataclass(frozen=True, repr=False)
class GenerationResult:
    """The answer to one prompt.

    `token_ids` are the new tokens, a stop token included; `text` is their text, without special tokens unless the
    request asked for them, cut before a stop string. `finish_reason` is "stop" where a stop token or stop string ended
    it, "length" where max_new_tokens did, "cancelled" where a caller or a timeout did, and None where a stream was
    closed before any of these. `seed` is what a sampled answer was drawn with: the same prompt, sampling options and
    seed give it again. `logprobs` has an entry for each new token and `prompt_logprobs` one for each prompt token, None
    for the first, which follows nothing; both are None unless the request asked for them. Results are hashable: ids are
    tuples, which never equal a list, so compare lists with `list(result.token_ids)`.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stats: Stats
    seed: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        ids = ", ".join(map(str, self.token_ids[:_SHOWN_IDS]))
        more = f", … {len(self.token_ids)} in all" if len(self.token_ids) > _SHOWN_IDS else ""
        return (
            f"GenerationResult(text={self.text!r}, token_ids=({ids}{more}), finish_reason={self.finish_reason!r}, "
            f"stats='{self.stats}')"
        )

    def _repr_html_(self) -> str:
        """The answer as a notebook displays it: its text, and the numbers below."""
        text = html.escape(self.text) or "<em>no text</em>"
        return (
            f'<div style="white-space: pre-wrap; text-align: left">{text}</div>'
            f'<div style="text-align: left; opacity: 0.7"><small>{html.escape(str(self.stats))} · '
            f"finish reason: {self.finish_reason}</small></div>"
        )

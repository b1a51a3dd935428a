"""The story of one request.

The prompt is checked, tokenised (request.py, tokenizer.py) and queued for a row (queue.py, rows.py); prefill runs it
and picks the first token (prefill.py); decode steps pick the rest (decode.py); each token becomes text (answer.py) and
is handed out as a piece (stream.py); the pieces together are the result (result.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from runtime import loading
from runtime.checkpoint.progress import progress_bar
from runtime.engine.async_stream import AsyncStream
from runtime.engine.options import BatchOptions, Options, StreamOptions
from runtime.engine.prompt import Batch, Encoded, Prompt
from runtime.engine.request import read_raw_request, read_request, takes_options
from runtime.engine.result import GenerationResult
from runtime.engine.scheduler import check_open
from runtime.engine.stream import Stream
from runtime.engine.turn import Turn
from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.model.model import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload  # str is a sequence of str too: the first overload that fits decides
def generate(  # type: ignore[overload-overlap]
    model_or_prompt: Model, prompt: Prompt, **options: Unpack[BatchOptions]
) -> GenerationResult: ...
@overload
def generate(model_or_prompt: Model, prompt: Batch, **options: Unpack[BatchOptions]) -> list[GenerationResult]: ...
@overload
def generate(
    model_or_prompt: Model, prompt: Encoded, **options: Unpack[BatchOptions]
) -> GenerationResult | list[GenerationResult]: ...
@overload
def generate(  # type: ignore[overload-overlap]
    model_or_prompt: Prompt, **options: Unpack[BatchOptions]
) -> GenerationResult: ...
@overload
def generate(model_or_prompt: Batch, **options: Unpack[BatchOptions]) -> list[GenerationResult]: ...
@overload
def generate(
    model_or_prompt: Encoded, **options: Unpack[BatchOptions]
) -> GenerationResult | list[GenerationResult]: ...
@overload
def generate(
    model_or_prompt: Model, prompt: Prompt | Batch | Encoded, *, n: int, **options: Unpack[BatchOptions]
) -> list[GenerationResult]: ...
@overload
def generate(
    model_or_prompt: Prompt | Batch | Encoded, *, n: int, **options: Unpack[BatchOptions]
) -> list[GenerationResult]: ...
@takes_options
def generate(
    model_or_prompt: Model | Prompt | Batch | Encoded,
    prompt: Prompt | Batch | Encoded | None = None,
    *,
    progress: bool | None = None,
    **options: Unpack[StreamOptions],
) -> GenerationResult | list[GenerationResult]:
    """Answer a prompt, or a batch of them, greedily unless a temperature is given.

    `generate("...")` alone runs the default model ($GEMMA_RUNTIME_MODEL or the demo), loaded once per process.

    Args:
        model_or_prompt: the model, followed by the prompt; or the prompt alone.
        prompt: text, token ids (a list, or a one-dimensional numpy array or torch tensor), or what a transformers
            tokenizer returns, whose padding is dropped. A list of these, or a two-dimensional array, is a batch of any
            size: max_batch of its prompts run at a time, and as one ends the next begins. Each gets the tokens that it
            would get alone.
        progress: whether to draw a progress bar of a batch's answers on stderr; None draws one on a terminal, for
            batches that are larger than max_batch.

    Keyword Args:
        max_new_tokens: most tokens to generate per prompt; 0 gives an empty answer.
        stop: string or strings that end the answer at the token that completes one, wherever it begins, as
            transformers' `stop_strings` do; special tokens count as they are spelled (`"<end_of_turn>"`). The text is
            cut before the string.
        ignore_eos: whether to go on past the checkpoint's stop tokens.
        timeout: seconds after which unfinished answers are cancelled: each keeps its tokens so far, with the finish
            reason "cancelled". None for no limit.
        cancel: an event that does the same once it is set, within one step.
        reuse: whether to reuse the KV cache of earlier prompts that begin alike, as the turns of a chat do, and to keep
            this prompt's for later ones (prefix caching). The answer's tokens are the same either way;
            `stats.cached_tokens` counts the prompt tokens that were reused.
        speculate: "prompt" guesses the next tokens from what followed the last ones earlier in the prompt or the answer
            (prompt lookup), and checks up to 7 guesses in one step: faster where the answer repeats its input, as edits
            and quotes do, with the same tokens. Guesses are made only while they pay and no other answer is being
            decoded; on a CPU without compiled kernels or with `eager` there are none. On a GPU the model must be loaded
            with a max_batch of at least 2, better 8, since guesses are rows of a step. None for one token per step.
        n: how many answers each prompt gets, drawn with `seed`, `seed` + 1 and so on; one run of the prompt serves as
            many of them as there are free rows. The result is then a list; for a batch it begins with all answers to
            the first prompt. None for a single answer, not in a list.
        temperature: 0 picks the most likely token; above 0, each token is drawn from the softmax of logits /
            temperature. For a batch, this and every option down to `prompt_logprobs` may be a list with one value per
            prompt.
        top_k: draw only from this many likeliest tokens, and any tied with the last of them; None or 0 for all.
        top_p: then only from the fewest likeliest tokens that reach this probability together, above 0, at most 1.
        min_p: then only from tokens at least this fraction, 0 to 1, as likely as the likeliest. These three have no
            effect at temperature 0.
        seed: 0 to 2^64 - 1: equal seeds give equal answers, alone or in any batch, with or without speculation. None
            draws a random seed; the result's `seed` reproduces the answer.
        repetition_penalty: divides positive logits of tokens that occur in the prompt or the answer, and multiplies
            negative ones; above 0, 1 for no penalty. None for the checkpoint's, usually no penalty.
        presence_penalty: subtracted from the logits of tokens that occur in the answer, -2 to 2.
        frequency_penalty: likewise, once per occurrence, -2 to 2.
        logit_bias: a mapping from token ids to what is added to their logits; -inf bans a token.
        min_new_tokens: how many new tokens there must be before a stop token can be picked. None for the checkpoint's,
            usually 0.
        logprobs: report each new token's log probability, and those of this many likeliest tokens in its place (0 for
            none), in `result.logprobs` and `piece.logprob`. They follow from the model's own logits, before the request
            changes any.
        prompt_logprobs: the same for the prompt's tokens, in `result.prompt_logprobs`; `max_new_tokens=0` runs only the
            prompt. The whole prompt is then run, with nothing reused.
        stop_token_ids: tokens that end an answer, besides the checkpoint's; one list for all prompts.
        response_format: the format that answers must have: a pydantic class, a JSON schema, `{"regex": ...}`,
            `{"grammar": ...}` or one of OpenAI's forms; docs/usage.md lists them all. An answer ends where nothing can
            follow it. Needs `gemma-runtime[structured]`; one for all prompts.
        logits_processors: functions of all token ids so far, [1, seq] int64, and logits [1, vocab] fp32 that return
            logits, as transformers' `LogitsProcessor`; one list for all prompts. If one raises, only the answer at hand
            ends.
        skip_special_tokens: whether the text leaves out special tokens, such as the one that ended it. False gives the
            text of all ids, except for a stop string and what follows it.

    Every option from `top_k` to `logits_processors`, except `seed` and the stops, needs all logits of a row:
    docs/usage.md says what a token then costs. The other rows of the batch still get the same tokens.

    Returns:
        A GenerationResult, or for a batch or with `n` a list of them in the order of the prompts.

    Raises:
        ValueError, TypeError: prompt or options cannot be run; nothing has been changed.
        ModelClosed: the model has been closed.
        NonFiniteError: a row's logits were not finite; raised once the other rows' answers are complete.
        GrammarTooComplex: a row's `response_format` came to a place beyond the limits of the library that follows it.
    """
    with stream(model_or_prompt, prompt, **options) as pieces:  # type: ignore[arg-type, call-overload]
        total = len(pieces.request.prompts) * (pieces.request.n or 1)
        shown = False if progress is None and total <= pieces.model.runtime.max_batch else progress
        with progress_bar("answers", total, shown, unit="answer") as bar:
            for _ in pieces:
                if not bar.disable:
                    bar.update(pieces.finished - bar.n)
    return pieces.results if pieces.request.is_list else pieces.results[0]


@overload
def chat(model: Model, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]) -> GenerationResult: ...
@overload
def chat(
    model: Model, messages: Sequence[Mapping[str, Any]], *, n: int, **options: Unpack[Options]
) -> list[GenerationResult]: ...
@takes_options
def chat(
    model: Model, messages: Sequence[Mapping[str, Any]], **options: Unpack[StreamOptions]
) -> GenerationResult | list[GenerationResult]:
    """Answer a conversation, rendered by the checkpoint's chat template.

    Args:
        model: an instruction-tuned model.
        messages: mappings with "role" and "content", the last one the user's. To stream the answer instead, give
            `model.tokenizer.apply_chat(messages)` to `stream`.
        options: as in `generate`.

    Raises:
        ValueError, TypeError: as `generate`; or the messages are malformed, or there is no chat template.
    """
    if not isinstance(model, Model):
        raise InvalidArgumentType(f"expected a model before the messages, got {type(model).__name__}")
    if model.tokenizer is None:
        raise InvalidArgument(f"chat needs a tokenizer, but {model.name} has none")
    if not model.tokenizer.has_chat_template:
        raise InvalidArgument(
            f"{model.name} has no chat template, as base models have none: use runtime.generate(model, prompt)"
        )
    ids: list[int] = model.tokenizer.apply_chat(messages)
    return generate(model, ids, **options)  # type: ignore[arg-type]


@overload
def stream(model_or_prompt: Model, prompt: Prompt | Batch | Encoded, **options: Unpack[StreamOptions]) -> Stream: ...
@overload
def stream(model_or_prompt: Prompt | Batch | Encoded, **options: Unpack[StreamOptions]) -> Stream: ...
@takes_options
def stream(
    model_or_prompt: Model | Prompt | Batch | Encoded,
    prompt: Prompt | Batch | Encoded | None = None,
    **options: Unpack[StreamOptions],
) -> Stream:
    """Answer a prompt piece by piece, each as soon as its token is known.

    Everything is checked here; the request begins when the first piece is asked for.

    Args:
        model_or_prompt, prompt, options: as in `generate`.

    Returns:
        An iterator of pieces, one per token, whose texts together are the result's text; in a batch, `piece.index`
        tells whose they are. Any number of streams may be open, and reading one keeps all of them going.

    Raises:
        ValueError, TypeError: prompt or options cannot be run; nothing has been changed.
        ModelClosed: the model has been closed; if it is closed later, raised with the next piece.
        NonFiniteError: raised after the last piece if a row's logits were not finite. That row's answer ends there,
            with no finish reason; the others are completed, and `results` has them.
    """
    if isinstance(model_or_prompt, Model):
        model, raw = model_or_prompt, read_raw_request(prompt, **options)
    elif prompt is not None:
        raise InvalidArgumentType(f"expected a model before the prompt, got {type(model_or_prompt).__name__}")
    else:
        raw = read_raw_request(model_or_prompt, **options)
        with _default_model_turn.held():
            model = _default_model()
    check_open(model)
    return Stream(model, read_request(model, raw))


@takes_options
async def agenerate(
    model_or_prompt: Model | Prompt | Batch | Encoded,
    prompt: Prompt | Batch | Encoded | None = None,
    **options: Unpack[StreamOptions],
) -> GenerationResult | list[GenerationResult]:
    """`generate` for asyncio: the event loop keeps running meanwhile, and cancelling the task cancels the request.

    Args, returns, raises: as `generate`.
    """
    async with astream(model_or_prompt, prompt, **options) as pieces:
        async for _ in pieces:
            pass
    return pieces.results if pieces.is_list else pieces.results[0]


@takes_options
def astream(
    model_or_prompt: Model | Prompt | Batch | Encoded,
    prompt: Prompt | Batch | Encoded | None = None,
    **options: Unpack[StreamOptions],
) -> AsyncStream:
    """`stream` for asyncio: `async for piece in runtime.astream(model, prompt)`.

    Args, returns, raises: as `stream`.
    """
    return AsyncStream(stream(model_or_prompt, prompt, **options))  # type: ignore[arg-type, call-overload]


@functools.cache
def _default_model() -> Model:
    return loading.read(loading.resolve(), Model)


_default_model_turn = Turn()  # two threads that need it at the same time must not load it twice

"""The story of one request.

The prompt is checked and becomes ids (request.py, tokenizer.py); prefill runs them and picks the first token
(prefill.py); decode steps pick the others (decode.py); each token becomes text (answer.py) and is handed out as a
piece, and the pieces together are the result (result.py).
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import Any, overload

from runtime import loading
from runtime.engine import decode
from runtime.engine.answer import Answer
from runtime.engine.clock import Clock
from runtime.engine.engine import check_open, request_on
from runtime.engine.lock import RequestLock
from runtime.engine.non_finite import non_finite
from runtime.engine.prefill import prefill
from runtime.engine.prompt import Batch, Encoded, Prompt
from runtime.engine.request import Request, read_raw_request, read_request
from runtime.engine.result import GenerationResult, Piece
from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.kernels.argmax import NO_TOKEN
from runtime.model.model import Model

Stop = str | Sequence[str] | None


@overload  # str is a sequence of str too: the first overload that fits decides
def generate(  # type: ignore[overload-overlap]
    model_or_prompt: Model, prompt: Prompt, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> GenerationResult: ...
@overload
def generate(
    model_or_prompt: Model, prompt: Batch, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> list[GenerationResult]: ...
@overload
def generate(
    model_or_prompt: Model, prompt: Encoded, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> GenerationResult | list[GenerationResult]: ...
@overload
def generate(  # type: ignore[overload-overlap]
    model_or_prompt: Prompt, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> GenerationResult: ...
@overload
def generate(
    model_or_prompt: Batch, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> list[GenerationResult]: ...
@overload
def generate(
    model_or_prompt: Encoded, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> GenerationResult | list[GenerationResult]: ...
def generate(
    model_or_prompt: Model | Prompt | Batch | Encoded,
    prompt: Prompt | Batch | Encoded | None = None,
    *,
    max_new_tokens: int = 128,
    stop: Stop = None,
    ignore_eos: bool = False,
) -> GenerationResult | list[GenerationResult]:
    """Answer a prompt, or a batch of them, greedily.

    `generate("...")` alone runs the default model ($GEMMA_RUNTIME_MODEL or the demo), loaded once per process.

    Args:
        model_or_prompt: the model, followed by the prompt; or the prompt alone.
        prompt: text, token ids (a list, or a numpy array or torch tensor of one dimension), or what a transformers
            tokenizer returns, without its padding. A list of those, or an array of two dimensions, is a batch of up to
            max_batch rows, which may differ in length. Each row gets the tokens that it would get alone.
        max_new_tokens: most tokens to generate per row; 0 gives an empty answer.
        stop: string or strings that end the answer, as transformers' `stop_strings` do: with special tokens spelled out
            ("<end_of_turn>"), at the token that completes one, wherever it begins. The text is cut before them.
        ignore_eos: whether to go on past the checkpoint's stop tokens.

    Returns:
        A GenerationResult, or for a batch a list of them.

    Raises:
        ValueError, TypeError: prompt or options cannot be run; nothing has been changed.
        ModelBusy: this thread has an unfinished stream on the model.
        ModelClosed: the model has been closed.
        NonFiniteError: a row's logits were not finite, after the other rows' answers are complete.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop, "ignore_eos": ignore_eos}
    with stream(model_or_prompt, prompt, **options) as pieces:  # type: ignore[arg-type, call-overload]
        for _ in pieces:
            pass
    return pieces.results if pieces.request.is_batch else pieces.results[0]


def chat(
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
    stop: Stop = None,
    ignore_eos: bool = False,
) -> GenerationResult:
    """Answer a conversation, rendered by the checkpoint's chat template.

    Args:
        model: an instruction-tuned model.
        messages: mappings with "role" and "content", the user's last. To stream the answer instead, give
            `model.tokenizer.apply_chat(messages)` to `stream`.
        max_new_tokens, stop, ignore_eos: as in `generate`.

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
    return generate(model, ids, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos)


@overload
def stream(
    model_or_prompt: Model,
    prompt: Prompt | Batch | Encoded,
    *,
    max_new_tokens: int = ...,
    stop: Stop = ...,
    ignore_eos: bool = ...,
) -> Stream: ...
@overload
def stream(
    model_or_prompt: Prompt | Batch | Encoded, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> Stream: ...
def stream(
    model_or_prompt: Model | Prompt | Batch | Encoded,
    prompt: Prompt | Batch | Encoded | None = None,
    *,
    max_new_tokens: int = 128,
    stop: Stop = None,
    ignore_eos: bool = False,
) -> Stream:
    """Answer a prompt piece by piece, each as soon as its token is known.

    Everything is checked here, before the first piece is asked for. The model is taken with the first piece and given
    back with the last, on an error, or by `close()`.

    Args:
        model_or_prompt, prompt, max_new_tokens, stop, ignore_eos: as in `generate`.

    Returns:
        An iterator of pieces, one per token, whose texts together are the result's text. The rows of a batch take
        turns, told apart by `piece.index`.

    Raises:
        ValueError, TypeError: prompt or options cannot be run; nothing has been changed.
        ModelBusy, with the first piece: this thread has another unfinished stream on the model.
        ModelClosed: the model has been closed; of one that is closed later, with the next piece.
        NonFiniteError, after the last piece: a row's logits were not finite. Its answer ends there, with no finish
            reason; the other rows' go on, and `results` has them.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop, "ignore_eos": ignore_eos}
    if isinstance(model_or_prompt, Model):
        model, raw = model_or_prompt, read_raw_request(prompt, **options)
    elif prompt is not None:
        raise InvalidArgumentType(f"expected a model before the prompt, got {type(model_or_prompt).__name__}")
    else:
        raw = read_raw_request(model_or_prompt, **options)
        with _default_model_lock.held():
            model = _default_model()
    check_open(model)
    return Stream(model, read_request(model, raw))


class Stream:
    """The pieces of one request as they come, and `results`: what has come so far, one GenerationResult per row.

    Closing it, leaving its `with` block or dropping the last reference to it frees the model for the next call.
    """

    def __init__(self, model: Model, request: Request) -> None:
        self.request = request
        self._clock = Clock(model.plan, [len(ids) for ids in request.prompts])
        stop_ids = () if request.ignore_eos else model.config.stop_token_ids
        self._answers = [
            Answer(row, model.tokenizer, request.max_new_tokens, stop_ids, request.stop_strings, ids)
            for row, ids in enumerate(request.prompts)
        ]
        self._pieces = _run(model, request, self._answers, self._clock)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the request where it stands."""
        self._pieces.close()

    @property
    def results(self) -> list[GenerationResult]:
        stats = self._clock.stats(sum(len(answer.token_ids) for answer in self._answers))
        return [
            GenerationResult(answer.text, tuple(answer.token_ids), tuple(ids), answer.finish_reason, stats)
            for answer, ids in zip(self._answers, self.request.prompts, strict=True)
        ]


def _run(model: Model, request: Request, answers: list[Answer], clock: Clock) -> Generator[Piece, None, None]:
    """Run a request, holding the model's engine until it ends."""
    if not request.max_new_tokens:
        return
    with request_on(model) as engine:
        stop_ids = () if request.ignore_eos else model.config.stop_token_ids
        state = engine.ready_state(len(request.prompts), stop_ids)
        clock.start()
        first = [prefill(model, state, row, ids) for row, ids in enumerate(request.prompts)]
        rest = decode.tokens(model, state, request.max_new_tokens - 1)
        with closing(rest):
            unfinished = list(answers)
            failed: list[Answer] = []
            for step in chain([[int(token) for token in first]], rest):
                clock.tick()
                for answer in unfinished:
                    if step[answer.index] == NO_TOKEN:
                        failed.append(answer)
                    else:
                        yield answer.take(step[answer.index])
                        check_open(model)  # the reader may have closed it
                unfinished = [answer for answer in unfinished if answer.finish_reason is None and answer not in failed]
                if not unfinished:
                    break
            if failed:
                where = ", ".join(f"token {len(a.token_ids)} of prompt {a.index}" for a in failed)
                raise non_finite(model, f"of {where}" if request.is_batch else f"of token {len(failed[0].token_ids)}")


@functools.cache
def _default_model() -> Model:
    return loading.read(loading.resolve(), Model)


_default_model_lock = RequestLock()  # two threads that need it at the same time must not load it twice

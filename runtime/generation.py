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

from runtime.engine import decode
from runtime.engine.answer import Answer
from runtime.engine.clock import Clock
from runtime.engine.engine import engine_of
from runtime.engine.non_finite import non_finite
from runtime.engine.prefill import prefill
from runtime.engine.request import Request, read_request
from runtime.engine.result import GenerationResult, Piece
from runtime.engine.turn import Turn
from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.families.state import DecodeState, new_state
from runtime.kernels.argmax import NO_TOKEN
from runtime.loading import load
from runtime.model.model import Model

Prompt = str | Sequence[int]
Batch = Sequence[str] | Sequence[Sequence[int]]
Stop = str | Sequence[str] | None


@overload  # a text is a sequence of texts too: the first that fits decides
def generate(  # type: ignore[overload-overlap]
    model_or_prompt: Model, prompt: Prompt, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> GenerationResult: ...
@overload
def generate(
    model_or_prompt: Model, prompt: Batch, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> list[GenerationResult]: ...
@overload
def generate(  # type: ignore[overload-overlap]
    model_or_prompt: Prompt, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> GenerationResult: ...
@overload
def generate(
    model_or_prompt: Batch, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> list[GenerationResult]: ...
def generate(
    model_or_prompt: Model | Prompt | Batch,
    prompt: Prompt | Batch | None = None,
    *,
    max_new_tokens: int = 128,
    stop: Stop = None,
    ignore_eos: bool = False,
) -> GenerationResult | list[GenerationResult]:
    """Answer a prompt, or a batch of them, greedily.

    `generate("...")` alone runs the default model ($GEMMA_RUNTIME_MODEL or the demo), loaded once per process.

    Args:
        model_or_prompt: the model, followed by the prompt; or the prompt alone.
        prompt: text, a list of token ids, or a list of either: a batch of up to max_batch rows, which may differ in
            length. Each row gets the tokens that it would get alone.
        max_new_tokens: most tokens to generate per row; 0 gives an empty answer.
        stop: string or strings that end the answer, as transformers' `stop_strings` do: with special tokens spelled out
            ("<end_of_turn>"), at the token that completes one, wherever it begins. The text is cut before them.
        ignore_eos: whether to go on past the checkpoint's stop tokens.

    Returns:
        A GenerationResult, or for a batch a list of them.

    Raises:
        ValueError, TypeError: prompt or options cannot be run; nothing has been changed.
        RuntimeError: this thread has an unfinished stream on the model.
        NonFiniteError: a row's logits were not finite, after the other rows' answers are complete.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop, "ignore_eos": ignore_eos}
    with stream(model_or_prompt, prompt, **options) as pieces:  # type: ignore[arg-type, call-overload]
        for _ in pieces:
            pass
    return pieces.results if pieces.request.is_batch else pieces.results[0]


def chat(
    model: Model,
    messages: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 128,
    stop: str | Sequence[str] | None = None,
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
    if model.tokenizer is None:
        raise InvalidArgument(f"chat needs a tokenizer, but {model.name} has none")
    ids = model.tokenizer.apply_chat(messages)
    return generate(model, ids, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos)


@overload
def stream(
    model_or_prompt: Model,
    prompt: Prompt | Batch,
    *,
    max_new_tokens: int = ...,
    stop: Stop = ...,
    ignore_eos: bool = ...,
) -> Stream: ...
@overload
def stream(
    model_or_prompt: Prompt | Batch, *, max_new_tokens: int = ..., stop: Stop = ..., ignore_eos: bool = ...
) -> Stream: ...
def stream(
    model_or_prompt: Model | Prompt | Batch,
    prompt: Prompt | Batch | None = None,
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
        RuntimeError, with the first piece: this thread has another unfinished stream on the model.
        NonFiniteError, after the last piece: a row's logits were not finite. Its answer ends there, with no finish
            reason; the other rows' go on, and `results` has them.
    """
    model, prompt = _model_and_prompt(model_or_prompt, prompt)
    request = read_request(model, prompt, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos)
    return Stream(model, request)


class Stream:
    """The pieces of one request as they come, and `results`: what has come so far, one GenerationResult per row.

    Closing it, leaving its `with` block or letting go of it frees the model for the next call.
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
            GenerationResult(answer.text, list(answer.token_ids), list(ids), answer.finish_reason, stats)
            for answer, ids in zip(self._answers, self.request.prompts, strict=True)
        ]


def _run(model: Model, request: Request, answers: list[Answer], clock: Clock) -> Generator[Piece, None, None]:
    """The request itself, from taking the model to giving it back."""
    if not request.max_new_tokens:
        return
    with engine_of(model).turn.taken():
        state = _ready_state(model, len(request.prompts), () if request.ignore_eos else model.config.stop_token_ids)
        clock.start()
        first = [prefill(model, state, row, ids) for row, ids in enumerate(request.prompts)]
        rest = decode.tokens(model, state, request.max_new_tokens - 1)
        with closing(rest):
            going = list(answers)
            failed: list[Answer] = []
            for step in chain([[int(token) for token in first]], rest):
                clock.tick()
                for answer in going:
                    if step[answer.index] == NO_TOKEN:
                        failed.append(answer)
                    else:
                        yield answer.take(step[answer.index])
                going = [answer for answer in going if answer.finish_reason is None and answer not in failed]
                if not going:
                    break
            if failed:
                where = ", ".join(f"token {len(a.token_ids)} of prompt {a.index}" for a in failed)
                raise non_finite(model, f"of {where}" if request.is_batch else f"of token {len(failed[0].token_ids)}")


def _ready_state(model: Model, batch: int, stop_ids: Sequence[int]) -> DecodeState:
    """The model's decode state, made once, cut to at least `batch` rows; the surplus rows are done from the start."""
    engine = engine_of(model)
    whole = new_state(model, model.runtime.max_batch) if engine.state is None else engine.state
    state = whole.first_rows(decode.rows_of_step(model, batch))
    if engine.state is None and not model.runtime.eager:
        decode.stepper(model, state)()  # a step on nothing: it compiles what no token of the request then waits for
    engine.state = whole
    state.reset(stop_ids, rows=batch)
    return state


def _model_and_prompt(first: Any, second: Any) -> tuple[Model, Any]:
    """Tell a model and its prompt from a prompt alone, which the default model answers."""
    if isinstance(first, Model):
        return first, second
    if second is not None:
        raise InvalidArgumentType(f"expected a model before the prompt, got {type(first).__name__}")
    with _default_model_turn.taken():
        return _default_model(), first


@functools.cache
def _default_model() -> Model:
    return load()


_default_model_turn = Turn()  # two threads whose first calls meet must not load twice

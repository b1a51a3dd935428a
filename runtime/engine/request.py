"""A caller's prompt and options, validated in full before anything else happens."""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from runtime.engine.prompt import has_surrogate, read_rows
from runtime.engine.ranges import marked
from runtime.engine.sampling import SamplingParams, Seed, Temperature, read_sampling
from runtime.engine.speculation import refusal
from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.model.model import Model

Stop = str | Sequence[str] | None
Speculate = Literal["prompt"] | None


class Options(TypedDict, total=False):
    """What every request may say of its answers, as `runtime.generate` explains it."""

    max_new_tokens: int
    stop: Stop
    ignore_eos: bool
    timeout: float | None
    cancel: threading.Event | None
    reuse: bool
    speculate: Speculate
    temperature: Temperature
    seed: Seed
    skip_special_tokens: bool


class BatchOptions(Options, total=False):
    """The same, and what waits for all answers of a batch."""

    progress: bool | None


@dataclass(frozen=True)
class RawRequest:
    """One call before its model is known: a text or ids for each row, and how answers end."""

    rows: list[str | list[Any]]
    is_batch: bool
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    ignore_eos: bool
    timeout: float | None
    cancel: Any  # what has is_set(), as a threading.Event; or None
    reuse: bool
    speculate: Speculate
    sampling: tuple[SamplingParams, ...]  # of each row
    skip_special_tokens: bool


@dataclass(frozen=True)
class Request(RawRequest):
    """One call on a model: its prompts as ids, a list per row."""

    prompts: list[list[int]]


def read_raw_request(
    prompt: Any,
    *,
    max_new_tokens: int = 128,
    stop: Stop = None,
    ignore_eos: bool = False,
    timeout: float | None = None,
    cancel: threading.Event | None = None,
    reuse: bool = True,
    speculate: Speculate = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    skip_special_tokens: bool = True,
) -> RawRequest:
    """Check all of a caller's prompt and options that can be checked without a model.

    Args:
        prompt: text or ids, or a batch of either, as `read_rows`.
        max_new_tokens: most tokens to generate, 0 allowed.
        stop: string or strings that end the text.
        ignore_eos: whether to go on past the checkpoint's stop tokens.
        timeout: seconds after which unfinished answers are cancelled.
        cancel: an event that cancels them once it is set.
        reuse: whether prompts take over what earlier ones have left in the cache, and leave theirs.
        speculate: "prompt" to guess at next tokens from those so far; None for plain steps.
        temperature, seed: as `SamplingParams`; of a batch, one value or one for each prompt.
        skip_special_tokens: whether the text leaves out special tokens.

    Raises:
        ValueError, TypeError: anything is out of range or of the wrong type; the message has both sides.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=0)
    stop_strings = _read_stop(stop)
    flags = {"ignore_eos": ignore_eos, "reuse": reuse, "skip_special_tokens": skip_special_tokens}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InvalidArgumentType(f"{name} must be True or False, got {flag!r}")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
        raise InvalidArgumentType(f"timeout must be a number of seconds or None, got {timeout!r}")
    if timeout is not None and not timeout >= 0:
        raise InvalidArgument(f"timeout must be at least 0 seconds, got {timeout}")
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise InvalidArgumentType(f"cancel must be a threading.Event or None, got {type(cancel).__name__}")
    if speculate is not None and not isinstance(speculate, str):
        raise InvalidArgumentType(f'speculate must be "prompt" or None, got {speculate!r}')
    if speculate not in (None, "prompt"):
        raise InvalidArgument(f'speculate must be "prompt" or None, got {speculate!r}')
    rows, is_batch = read_rows(prompt)
    return RawRequest(
        rows,
        is_batch,
        max_new_tokens,
        stop_strings,
        ignore_eos,
        timeout,
        cancel,
        reuse,
        speculate,
        read_sampling(temperature, seed, len(rows), is_batch),
        skip_special_tokens,
    )


def read_request(model: Model, raw: RawRequest) -> Request:
    """Check a request against the model that will run it, and tokenise.

    Raises:
        ValueError, TypeError: an id is outside the vocabulary, there are too many tokens, text is given and the model
            has no tokenizer, or speculation is asked for where its kernels cannot check guesses.
    """
    check_speculation(model, raw)
    if raw.stop_strings and model.tokenizer is None:
        raise InvalidArgument(f"stop strings need text, but {model.name} has no tokenizer")
    prompts = []
    for index, row in enumerate(raw.rows):
        name = f"prompt[{index}]" if raw.is_batch else "prompt"
        prompts.append(_ids_of(model, row, name))
        check_length(model, name, len(prompts[-1]), "max_new_tokens", raw.max_new_tokens)
    return Request(**vars(raw), prompts=prompts)


def check_speculation(model: Model, raw: RawRequest) -> None:
    """Refuse to speculate on a GPU where the model's kernels cannot check guesses.

    Raises:
        ValueError: the model has one row, or too many query heads for a key head.
    """
    if raw.speculate is not None and model.device.type == "cuda" and (reason := refusal(model)):
        raise InvalidArgument(f"speculate must be None for this model on its GPU, got {raw.speculate!r}: {reason}")


def read_prompt(model: Model, prompt: Any, name: str = "prompt") -> list[int]:
    """Check one prompt in any form of `read_rows`, and return its ids.

    Raises:
        ValueError, TypeError: it is empty, of another type, a batch, or holds an id outside the vocabulary.
    """
    rows, is_batch = read_rows(prompt, name)
    if is_batch:
        raise InvalidArgumentType(f"{name} must be one prompt, got a batch of {len(rows)}")
    return _ids_of(model, rows[0], name)


def _ids_of(model: Model, row: str | list[Any], name: str) -> list[int]:
    if isinstance(row, str):
        if model.tokenizer is None:
            raise InvalidArgument(f"{name} is text, but {model.name} has no tokenizer: give a list of token ids")
        with marked("tokenise"):
            ids: list[int] = model.tokenizer.encode(row)
        if not ids:
            raise InvalidArgument(f"{name} is empty: {row!r} has no tokens")
        return ids
    return [whole_number(f"{name}[{i}]", token, least=0, most=model.config.vocab - 1) for i, token in enumerate(row)]


def check_length(model: Model, name: str, prompt_tokens: int, what: str, new_tokens: int) -> None:
    """Refuse a prompt that leaves too little room for its answer.

    Raises:
        ValueError: prompt and answer together pass max_seq_len.
    """
    limit = model.runtime.max_seq_len
    if prompt_tokens + new_tokens > limit:
        raise InvalidArgument(
            f"{name} and {what} must fit max_seq_len = {limit} together, got {prompt_tokens} + {new_tokens} = "
            f"{prompt_tokens + new_tokens} tokens"
        )


def whole_number(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Check that a value is an integer (no bool, no float) within bounds, and return it as an int.

    Raises:
        TypeError, ValueError: it is not; the message names the argument, the bounds and the value.
    """
    if isinstance(value, bool):
        raise InvalidArgumentType(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidArgumentType(f"{name} must be an integer, got {value!r}") from None
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidArgument(f"{name} must be {bounds}, got {number}")
    return number


def _read_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise InvalidArgumentType(f"stop must be a string or a list of strings, got {stop!r}")
    if not all(strings):
        raise InvalidArgument("stop must not hold an empty string: it would end every answer before it begins")
    for string in strings:
        if has_surrogate(string):
            raise InvalidArgument(f"stop must be valid Unicode, got half of a surrogate pair in {string!r}")
    return tuple(strings)

"""A caller's prompt and options, validated in full before anything else happens."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.model.model import Model


@dataclass(frozen=True)
class Request:
    """One call: the prompts as ids, one list per row, and how their answers end."""

    prompts: list[list[int]]
    is_batch: bool
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    ignore_eos: bool


def read_request(
    model: Model,
    prompt: Any,
    *,
    max_new_tokens: int = 128,
    stop: str | Sequence[str] | None = None,
    ignore_eos: bool = False,
) -> Request:
    """Check a caller's prompt and options against a model, and tokenise.

    Args:
        model: the model that will run it.
        prompt: text, a list of ids, or a list of either (a batch).
        max_new_tokens: most tokens to generate, 0 allowed.
        stop: string or strings that end the text.
        ignore_eos: whether to go on past the checkpoint's stop tokens.

    Raises:
        ValueError, TypeError: anything is out of range or of the wrong type; the message has both sides.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=0)
    stop_strings = _read_stop(model, stop)
    is_batch = isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], (str, list, tuple))
    rows = list(prompt) if is_batch else [prompt]
    if len(rows) > model.runtime.max_batch:
        raise InvalidArgument(
            f"the batch must have at most max_batch = {model.runtime.max_batch} prompts (chosen when the model was "
            f"loaded), got {len(rows)}"
        )
    names = [f"prompt[{row}]" for row in range(len(rows))] if is_batch else ["prompt"]
    prompts = [read_prompt(model, row, name) for row, name in zip(rows, names, strict=True)]
    for name, ids in zip(names, prompts, strict=True):
        check_length(model, name, len(ids), "max_new_tokens", max_new_tokens)
    return Request(prompts, is_batch, max_new_tokens, stop_strings, bool(ignore_eos))


def read_prompt(model: Model, prompt: Any, name: str = "prompt") -> list[int]:
    """Check one prompt, text or ids, and return its ids.

    Raises:
        ValueError, TypeError: it is empty, of another type, or holds an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise InvalidArgument(f"{name} is text, but {model.name} has no tokenizer: give a list of token ids")
        if not prompt:
            raise InvalidArgument(f"{name} is empty: expected some text or at least one token id")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InvalidArgument(f"{name} is not valid Unicode: it holds half of a surrogate pair")
        ids = model.tokenizer.encode(prompt)
    elif isinstance(prompt, (list, tuple)):
        ids = [_read_id(token, f"{name}[{i}]", model.config.vocab) for i, token in enumerate(prompt)]
    else:
        raise InvalidArgumentType(f"{name} must be text or a list of token ids, got {type(prompt).__name__}")
    if not ids:
        raise InvalidArgument(f"{name} is empty: expected some text or at least one token id")
    return ids


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


def _read_id(token: Any, name: str, vocab: int) -> int:
    return whole_number(name, token, least=0, most=vocab - 1)


def _read_stop(model: Model, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise InvalidArgumentType(f"stop must be a string or a list of strings, got {stop!r}")
    if not all(strings):
        raise InvalidArgument("stop must not hold an empty string: it would end every answer before it begins")
    for string in strings:
        if any("\ud800" <= character <= "\udfff" for character in string):
            raise InvalidArgument(f"stop must be valid Unicode, got half of a surrogate pair in {string!r}")
    if strings and model.tokenizer is None:
        raise InvalidArgument(f"stop strings need text, but {model.name} has no tokenizer")
    return tuple(strings)

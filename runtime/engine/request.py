"""A caller's prompt and options, validated in full before anything else happens."""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from runtime.engine.options import Speculate, Stop, StreamOptions, check_names
from runtime.engine.prompt import has_surrogate, read_rows
from runtime.engine.ranges import marked
from runtime.engine.speculation import refusal
from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.model.generation_config import MAX_STOP_IDS
from runtime.model.model import Model
from runtime.sampling.params import Biases, Integers, Numbers, OptionalNumbers, SamplingParams, read_sampling
from runtime.sampling.processors import Processor
from runtime.sampling.response_format import ResponseFormat, read_response_format

F = TypeVar("F", bound=Callable[..., Any])
MOST_ANSWERS = 1024  # to one prompt


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
    n: int | None  # answers to each row; None for a single one, not in a list
    sampling: tuple[SamplingParams, ...]  # of each row
    stop_token_ids: tuple[int, ...]
    response_format: ResponseFormat | None
    logits_processors: tuple[Processor, ...]
    skip_special_tokens: bool

    @property
    def is_list(self) -> bool:
        """Whether the result is a list of answers."""
        return self.is_batch or self.n is not None


@dataclass(frozen=True)
class Request(RawRequest):
    """One call on a model: its prompts as ids, a list per row."""

    prompts: list[list[int]]


def takes_options(function: F) -> F:
    """Gives a function with `**options` a signature that names each of them, for help(), notebooks and the like."""
    own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
    names = {one.name for one in own}
    options = [
        one
        for one in inspect.signature(_read_raw_request).parameters.values()
        if one.kind is one.KEYWORD_ONLY and one.name not in names
    ]
    function.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return function


def read_raw_request(prompt: Any, **options: Any) -> RawRequest:
    """Check all of a caller's prompt and options that can be checked without a model.

    Raises:
        ValueError, TypeError: anything is out of range, of the wrong type or unknown; the message gives what was
            expected and what was given.
    """
    check_names(options, StreamOptions.__annotations__)
    return _read_raw_request(prompt, **options)


def _read_raw_request(
    prompt: Any,
    *,
    max_new_tokens: int = 128,
    stop: Stop = None,
    ignore_eos: bool = False,
    timeout: float | None = None,
    cancel: threading.Event | None = None,
    reuse: bool = True,
    speculate: Speculate = None,
    n: int | None = None,
    temperature: Numbers = 0.0,
    top_k: Integers = None,
    top_p: OptionalNumbers = None,
    min_p: OptionalNumbers = None,
    seed: Integers = None,
    repetition_penalty: OptionalNumbers = None,
    presence_penalty: Numbers = 0.0,
    frequency_penalty: Numbers = 0.0,
    logit_bias: Biases = None,
    min_new_tokens: Integers = None,
    logprobs: Integers = None,
    prompt_logprobs: Integers = None,
    stop_token_ids: Sequence[int] = (),
    response_format: Any = None,
    logits_processors: Sequence[Processor] = (),
    skip_special_tokens: bool = True,
) -> RawRequest:
    """As `read_raw_request`; the options are those that every request has.

    Args:
        prompt: text or ids, or a batch of either, as `read_rows`.
        max_new_tokens: most tokens to generate, 0 allowed.
        stop: string or strings that end the text.
        ignore_eos: whether to go on past the checkpoint's stop tokens.
        timeout: seconds after which unfinished answers are cancelled.
        cancel: an event that cancels them once it is set.
        reuse: whether prompts use the prefix cache: reuse what earlier ones left in it, and leave their own.
        speculate: "prompt" to guess at next tokens from those so far; None for plain steps.
        n: how many answers each prompt gets, 1 to 1,024; None for one.
        temperature, top_k, top_p, min_p, seed: as `SamplingParams`; for a batch, one value or one for each prompt.
        repetition_penalty, presence_penalty, frequency_penalty, logit_bias, min_new_tokens: likewise.
        logprobs, prompt_logprobs: likewise.
        stop_token_ids: tokens that end an answer, besides the checkpoint's.
        response_format: what answers have to follow, as `read_response_format`; None for anything.
        logits_processors: the caller's own, as transformers calls them.
        skip_special_tokens: whether the text leaves out special tokens.

    Raises:
        ValueError, TypeError: anything is out of range or of the wrong type; the message gives what was expected and
            what was given.
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
    if n is not None:
        n = whole_number("n", n, least=1, most=MOST_ANSWERS)
    if not isinstance(stop_token_ids, list | tuple):
        raise InvalidArgumentType(f"stop_token_ids must be a list of token ids, got {stop_token_ids!r}")
    stop_ids = tuple(whole_number(f"stop_token_ids[{i}]", token, least=0) for i, token in enumerate(stop_token_ids))
    if not isinstance(logits_processors, list | tuple):
        raise InvalidArgumentType(f"logits_processors must be a list of functions, got {logits_processors!r}")
    for index, processor in enumerate(logits_processors):
        if not callable(processor):
            raise InvalidArgumentType(f"logits_processors[{index}] must be a function, got {processor!r}")
    if ignore_eos and response_format is not None:
        raise InvalidArgument("ignore_eos must be False with a response_format, which says where an answer ends")
    rows, is_batch = read_rows(prompt)
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling |= {"seed": seed}
    sampling |= {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty}
    sampling |= {"frequency_penalty": frequency_penalty, "logit_bias": logit_bias, "min_new_tokens": min_new_tokens}
    sampling |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
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
        n,
        read_sampling(sampling, len(rows), is_batch),
        stop_ids,
        read_response_format(response_format),
        tuple(logits_processors),
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
    if raw.response_format is not None and model.tokenizer is None:
        raise InvalidArgument(f"response_format needs text, but {model.name} has no tokenizer")
    _check_choices(model, raw)
    prompts = []
    for index, row in enumerate(raw.rows):
        name = f"prompt[{index}]" if raw.is_batch else "prompt"
        prompts.append(_ids_of(model, row, name))
        check_length(model, name, len(prompts[-1]), "max_new_tokens", raw.max_new_tokens)
    return Request(**vars(raw), prompts=prompts)


def _check_choices(model: Model, raw: RawRequest) -> None:
    """Checks a request's token ids and counts against the model's vocabulary and the answer's length."""
    vocab = model.config.vocab
    for token in raw.stop_token_ids:
        whole_number("a token id of stop_token_ids", token, least=0, most=vocab - 1)
    stops = {*raw.stop_token_ids, *(() if raw.ignore_eos else model.config.stop_token_ids)}
    if len(stops) > MAX_STOP_IDS:
        raise InvalidArgument(
            f"stop_token_ids and the checkpoint's stop tokens must be at most {MAX_STOP_IDS} together, got {len(stops)}"
        )
    for params in raw.sampling:
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(params, name)) is not None:
                whole_number(name, count, least=0, most=vocab)
        for token in params.logit_bias or ():
            whole_number("a token id of logit_bias", token, least=0, most=vocab - 1)
        if (params.min_new_tokens or 0) > raw.max_new_tokens:
            raise InvalidArgument(
                f"min_new_tokens must be at most max_new_tokens = {raw.max_new_tokens}, got {params.min_new_tokens}"
            )


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

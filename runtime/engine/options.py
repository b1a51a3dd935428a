"""The options of every request, and what other libraries call them."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Collection, Sequence
from typing import Any, Literal, TypedDict

from runtime.errors import InvalidArgumentType
from runtime.sampling.params import Biases, Integers, Numbers, OptionalNumbers
from runtime.sampling.processors import Processor

Stop = str | Sequence[str] | None
Speculate = Literal["prompt"] | None


class Options(TypedDict, total=False):
    """The options of every request, as `runtime.generate` explains them."""

    max_new_tokens: int
    stop: Stop
    ignore_eos: bool
    timeout: float | None
    cancel: threading.Event | None
    reuse: bool
    speculate: Speculate
    temperature: Numbers
    top_k: Integers
    top_p: OptionalNumbers
    min_p: OptionalNumbers
    seed: Integers
    repetition_penalty: OptionalNumbers
    presence_penalty: Numbers
    frequency_penalty: Numbers
    logit_bias: Biases
    min_new_tokens: Integers
    logprobs: Integers
    prompt_logprobs: Integers
    stop_token_ids: Sequence[int]
    response_format: Any
    logits_processors: Sequence[Processor]
    skip_special_tokens: bool


class StreamOptions(Options, total=False):
    """The same, and how many answers each prompt gets."""

    n: int | None


class BatchOptions(Options, total=False):
    """Those of `Options`, and one for calls that wait for all answers of a batch."""

    progress: bool | None


# What other libraries call an option, and its name here.
WORDS = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_length"), "max_new_tokens"),
    **dict.fromkeys(("min_tokens", "min_length"), "min_new_tokens"),
    "do_sample": "temperature (0 picks the most likely token)",
    "eos_token_id": "stop_token_ids",
    "logits_processor": "logits_processors",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "top_logprobs": "logprobs",
    "echo": "prompt_logprobs",
}


def check_names(given: Collection[str], known: Collection[str]) -> None:
    """Refuses unknown options, and names the one that was probably meant.

    Raises:
        TypeError: there is no such option.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            ours = WORDS.get(name, near[0] if near else None)
            raise InvalidArgumentType(f"there is no option {name}{f': here it is {ours}' if ours else ''}")

"""The harness's arguments as its own `hf` model takes them: honoured, accepted where they change nothing, or refused by
name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from transformers import GenerationConfig

from runtime.engine.request import whole_number
from runtime.errors import InvalidArgument
from runtime.model.config import MAX_BATCH
from runtime.model.placement import resolve_dtype

MAX_GEN_TOKS = 256  # the `hf` model's, where a task gives none
# Arguments of the `hf` model that change nothing at these values.
_NEUTRAL_FOR_MODEL: dict[str, tuple[Any, ...]] = {
    "backend": ("default", "causal"),
    "subfolder": ("", None),
    "tokenizer": (None,),
    "truncation": (False, None),
    "logits_cache": (True, False, None),
    "mixed_precision_dtype": (None,),
    "trust_remote_code": (False, None),
    "use_fast_tokenizer": (True, None),
    "parallelize": (False, None),
    "tp_plan": (None,),
    "peft": (None,),
    "delta": (None,),
    "autogptq": (False, None),
    "gptqmodel": (False, None),
    "gguf_file": (None,),
    "think_end_token": (None,),
    "enable_thinking": (None,),
}
# Arguments of transformers' `generate` that are honoured.
_HONOURED = ("repetition_penalty", "min_new_tokens")
_FILTERS = ("top_k", "top_p", "min_p")
_TOP_K = 50  # transformers' where neither the checkpoint nor the caller gives one
# Other arguments, at values that change nothing; for greedy answers, any value of those that only affect sampling.
_NEUTRAL_FOR_GENERATION: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "encoder_repetition_penalty": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "diversity_penalty": (0.0, None),
    "guidance_scale": (1.0, None),
    "min_length": (0, None),
}
_NEUTRAL_FOR_SAMPLING: dict[str, tuple[Any, ...]] = {"typical_p": (1.0, None)}
_WITHOUT_EFFECT = ("use_cache", "length_penalty", "early_stopping")


def check_model_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments that this runtime does not have, except those of the `hf` model that change nothing.

    Raises:
        ValueError: there is such an argument; the first is named.
    """
    for name, value in given.items():
        if name not in _NEUTRAL_FOR_MODEL:
            raise InvalidArgument(f"gemma-runtime has no argument {name}, got {name}={value!r}")
        if not _is_one_of(value, _NEUTRAL_FOR_MODEL[name]):
            raise InvalidArgument(f"{name}: expected {_NEUTRAL_FOR_MODEL[name][0]!r}, got {value!r}")


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """What a checkpoint's generation_config.json says about how to draw tokens; nothing where it has none."""
    if not (folder / "generation_config.json").is_file():
        return {}
    config = GenerationConfig.from_pretrained(folder)
    found = {name: getattr(config, name, None) for name in ("temperature", *_FILTERS)}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Answering:
    """How a context is to be answered: stop strings, the end of text included; the most tokens; and options of
    `runtime.generate` that say how tokens are chosen."""

    until: list[str]
    max_gen_toks: int
    choice: dict[str, Any]

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return "temperature" in self.choice


def read_generation_arguments(
    given: Mapping[str, Any], eos: str, max_length: int, defaults: Mapping[str, Any]
) -> Answering:
    """How a task wants its contexts answered.

    Args:
        given: the task's generation arguments.
        eos: the end of text.
        max_length: longest sequence in tokens; an answer has fewer.
        defaults: the checkpoint's generation settings, for `temperature` and filters.

    Raises:
        ValueError, TypeError: an argument is unknown to the harness, out of range or not supported here; the first is
            named.
    """
    until = [] if given.get("until") is None else given["until"]
    if not all(isinstance(string, str) for string in ([until] if isinstance(until, str) else until)):
        raise InvalidArgument(f"until must be a string or a list of strings, got {until!r}")
    try:
        options = dict(normalize_gen_kwargs({**given, "until": until}, MAX_GEN_TOKS))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"generation arguments {given} are not the harness's: {error}") from None
    until, max_gen_toks = handle_stop_sequences(options.pop("until"), eos=eos), options.pop("max_gen_toks")
    sampling = {name: options.pop(name) for name in ("temperature", *_FILTERS) if name in options}
    samples = options.pop("do_sample")
    if samples not in (True, False):
        raise InvalidArgument(f"do_sample must be True or False, got {samples!r}")
    choice = {name: options.pop(name) for name in _HONOURED if options.get(name) is not None}
    if samples:
        fallback = {"temperature": 1.0, "top_k": _TOP_K, **defaults}
        choice |= {name: value for name, value in {**fallback, **sampling}.items() if value is not None}
        if not choice["temperature"]:
            raise InvalidArgument(f"temperature must be above 0 with do_sample=True, got {choice['temperature']!r}")
    neutral = {**_NEUTRAL_FOR_GENERATION, **(_NEUTRAL_FOR_SAMPLING if samples else {})}
    ignored = (*_WITHOUT_EFFECT, *_HONOURED, *(() if samples else _NEUTRAL_FOR_SAMPLING))
    for name, value in options.items():
        if name not in ignored and not _is_one_of(value, neutral.get(name, ())):
            expected = f"{name}={neutral[name][0]!r}" if name in neutral else f"no {name}"
            raise InvalidArgument(f"gemma-runtime has no such decoding: expected {expected}, got {name}={value!r}")
    return Answering(until, whole_number("max_gen_toks", max_gen_toks, least=1, most=max_length - 1), choice)


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(value is each or (isinstance(value, type(each) | int) and value == each) for each in neutral)


def read_device(device: Any) -> str:
    """A device for `runtime.load`. Without a CUDA device "cuda" and "cuda:0" mean the CPU, as for the `hf` model.

    Raises:
        ValueError: it is none of "auto", "cpu", "cuda", "cuda:N".
    """
    name = "auto" if device is None else str(device)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InvalidArgument(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    return "cpu" if name in ("cuda", "cuda:0") and not torch.cuda.is_available() else name


def read_dtype(name: str, dtype: Any) -> str | None:
    """The name of a dtype in any spelling of `resolve_dtype`; None for "auto" and None.

    Raises:
        ValueError, TypeError: as `resolve_dtype`.
    """
    resolved = "auto" if dtype is None else resolve_dtype(dtype, name)
    return None if resolved == "auto" else resolved


def read_batch_size(batch_size: Any, max_batch_size: Any = None) -> tuple[int, bool]:
    """How many rows to decode together, and whether fewer will do where memory is short ("auto", "auto:N").

    Raises:
        ValueError, TypeError: it is neither "auto" nor a number from 1 to MAX_BATCH.
    """
    most = (
        MAX_BATCH if max_batch_size is None else min(MAX_BATCH, whole_number("max_batch_size", max_batch_size, least=1))
    )
    if batch_size is None:
        return 1, False
    if isinstance(batch_size, str):  # the harness's command line gives text
        if re.fullmatch(r"auto(:\d+(\.\d+)?)?", batch_size):
            return most, True
        if not (batch_size.isascii() and batch_size.isdecimal()):
            raise InvalidArgument(f'batch_size must be a number from 1 to {MAX_BATCH} or "auto", got {batch_size!r}')
        batch_size = int(batch_size)
    return whole_number("batch_size", batch_size, least=1, most=MAX_BATCH), False

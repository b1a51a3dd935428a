"""The harness's arguments as its own `hf` model takes them: what this runtime honours, what changes nothing here, and
what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from runtime.engine.request import whole_number
from runtime.errors import InvalidArgument
from runtime.model.config import DTYPES, MAX_BATCH

# Arguments of the `hf` model that leave it as it is at these values.
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
# Arguments of transformers' `generate` that leave greedy decoding as it is: at these values, or (None) at any.
_NEUTRAL_FOR_GENERATION: dict[str, tuple[Any, ...] | None] = {
    "do_sample": (False,),
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "typical_p": None,
    "use_cache": None,
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "repetition_penalty": (1.0, None),
    "encoder_repetition_penalty": (1.0, None),
    "length_penalty": None,
    "early_stopping": None,
    "no_repeat_ngram_size": (0, None),
    "diversity_penalty": (0.0, None),
    "guidance_scale": (1.0, None),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
}


def check_model_arguments(given: Mapping[str, Any]) -> None:
    """Refuse what the `hf` model takes and this one does not, unless it would change nothing, and what neither knows.

    Raises:
        ValueError: the first such argument, by name.
    """
    for name, value in given.items():
        if name not in _NEUTRAL_FOR_MODEL:
            raise InvalidArgument(f"gemma-runtime has no argument {name}, got {name}={value!r}")
        if not _among(value, _NEUTRAL_FOR_MODEL[name]):
            raise InvalidArgument(f"{name}: expected {_NEUTRAL_FOR_MODEL[name][0]!r}, got {value!r}")


def check_generation_arguments(given: Mapping[str, Any]) -> None:
    """Refuse what asks for anything but greedy decoding.

    Raises:
        ValueError: the first such argument, by name.
    """
    for name, value in given.items():
        neutral = _NEUTRAL_FOR_GENERATION.get(name, ())
        if neutral is not None and not _among(value, neutral):
            expected = f"{name}={neutral[0]!r}" if neutral else f"no {name}"
            raise InvalidArgument(f"gemma-runtime decodes greedily: expected {expected}, got {name}={value!r}")


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(value is each or (isinstance(value, type(each) | int) and value == each) for each in neutral)


def read_device(device: Any) -> str:
    """A device as `runtime.load` takes it. "cuda" and "cuda:0" are what harness scripts say on any machine: where there
    is no CUDA device, they mean the CPU, as for the `hf` model.

    Raises:
        ValueError: it is none of "auto", "cpu", "cuda", "cuda:N".
    """
    name = "auto" if device is None else str(device)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InvalidArgument(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    return "cpu" if name in ("cuda", "cuda:0") and not torch.cuda.is_available() else name


def read_dtype(name: str, dtype: Any) -> str | None:
    """A dtype's name from "bfloat16", "torch.bfloat16" or `torch.bfloat16`; None for "auto" and None.

    Raises:
        ValueError: it is none that this runtime computes in.
    """
    given = str(dtype).removeprefix("torch.")
    if given in ("None", "auto"):
        return None
    if given not in DTYPES:
        raise InvalidArgument(f"{name} must be one of {DTYPES}, got {dtype!r}")
    return given


def read_batch_size(batch_size: Any, max_batch_size: Any = None) -> tuple[int, bool]:
    """The rows to decode together, and whether fewer may be taken where memory is short ("auto", "auto:N").

    Raises:
        ValueError, TypeError: it is neither that nor a number from 1 to 8.
    """
    most = MAX_BATCH
    if max_batch_size is not None:
        most = min(MAX_BATCH, whole_number("max_batch_size", max_batch_size, least=1))
    if batch_size is None:
        return 1, False
    if isinstance(batch_size, str):  # the harness's command line gives text
        if re.fullmatch(r"auto(:\d+(\.\d+)?)?", batch_size):
            return most, True
        if not (batch_size.isascii() and batch_size.isdecimal()):
            raise InvalidArgument(f'batch_size must be a number from 1 to {MAX_BATCH} or "auto", got {batch_size!r}')
        batch_size = int(batch_size)
    return whole_number("batch_size", batch_size, least=1, most=MAX_BATCH), False

"""Hugging Face's config fields: typed access, transformers' defaults, and refusal of unsupported features.

Every error names the field, what was expected and what was given, in one line.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.errors import CheckpointError

MAX_INTEGER = 2**31 - 1  # sizes, positions and token ids fit 32 bits
MAX_NUMBER = 1e30  # well below fp32's overflow
MAX_LAYERS = 1024  # keeps per-layer data small whatever a config claims

_PLAIN_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Fields that transformers honours and this runtime does not, each with the values that change nothing. All other fields
# are either read by `ModelConfig.from_hf` or GenerationConfig, or change no token in transformers:
# tests/parity/test_config_fields.py tries them all.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attn_implementation": _PLAIN_ATTENTION,
    "_attn_implementation": _PLAIN_ATTENTION,
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "num_kv_shared_layers": (None, 0),
    "partial_rotary_factor": (None, 1),
    "use_bidirectional_attention": (None, False),
    # These rename fields or replace this file, whatever their value.
    **dict.fromkeys(("attribute_map", "configuration_files"), ()),
    **dict.fromkeys(("attention_chunk_size", "decoder", "fusion_config", "generator", "kv_sharing_modes"), (None,)),
    **dict.fromkeys(("per_layer_config", "quantization_config", "text_encoder", "transformers_weights"), (None,)),
}
# transformers' defaults where a config leaves a field out; None where the family has no such field.
_COMMON: dict[str, Any] = {
    "vocab_size": 256000,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": _COMMON
    | {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": _COMMON
    | {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
}
DEFAULTS["gemma3"] = DEFAULTS["gemma2"] | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: Any) -> str:
    """A value from a file as one short line of an error message."""
    return _short.repr(value)


def refuse(name: str, expected: str, given: Any) -> NoReturn:
    raise CheckpointError(f"{name} must be {expected}, got {shown(given)}")


def is_integer(value: Any, minimum: int = 1, maximum: int = MAX_INTEGER) -> bool:
    """Whether a value is an integer (not a bool or a float) within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def require_neutral(given: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields that ask for unsupported features.

    Args:
        given: the fields of a config.
        neutral: by field, the values that change nothing; an absent field is always fine.

    Raises:
        CheckpointError: a field of `neutral` has another value; it is named.
    """
    for name, values in neutral.items():
        if name in given and given[name] not in values:
            allowed = " or ".join(map(repr, values))
            refuse(
                name, f"{allowed} (nothing else is supported)" if values else "absent: it is not supported", given[name]
            )


@dataclass(frozen=True)
class Fields:
    """A config's fields, with defaults for those that are absent."""

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, self.defaults.get(name))

    def integer(self, name: str, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        """A size or a count."""
        value = self[name]
        if is_integer(value, minimum, maximum):
            return value
        refuse(name, f"an integer from {minimum} to {maximum}", value)

    def number(self, name: str) -> float:
        """A positive, finite number."""
        value = self[name]
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_NUMBER:
            return value
        refuse(name, "a positive number", value)

    def number_or_none(self, name: str) -> float | None:
        return None if self[name] is None else self.number(name)

"""The fields of a Hugging Face config, read by name and type, and those that must not say anything new.

Every error names the field, what was expected and what was given, in one line.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.errors import CheckpointError

MOST = 2**31 - 1  # of a size, a position or a token id: what 32 bits hold
LARGEST = 1e30  # of a number that is no size, far from overflow in fp32
MOST_LAYERS = 1024  # no decoder comes near, and what is kept per layer stays small

_PLAIN_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Fields that transformers acts on and this runtime does not, each with the values that change nothing. A field that
# is not named here, not read by `ModelConfig.from_hf` and not of generation changes no token in transformers either:
# tests/parity/test_config_fields.py tries them all.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_chunk_size": (None,),
    "attn_implementation": _PLAIN_ATTENTION,
    "_attn_implementation": _PLAIN_ATTENTION,
    "decoder": (None,),
    "fusion_config": (None,),
    "generator": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_sharing_modes": (None,),
    "num_kv_shared_layers": (None, 0),
    "partial_rotary_factor": (None, 1),
    "per_layer_config": (None,),
    "quantization_config": (None,),
    "text_encoder": (None,),
    "transformers_weights": (None,),
    "use_bidirectional_attention": (None, False),
    # Whatever they say, they rename fields or put another file in this one's place.
    "attribute_map": (),
    "configuration_files": (),
}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: Any) -> str:
    """A value from a file for an error message: one line, whatever its length or depth."""
    return _short.repr(value)


def refuse(name: str, expected: str, given: Any) -> NoReturn:
    raise CheckpointError(f"{name} must be {expected}, got {shown(given)}")


def is_whole(value: Any, least: int = 1, most: int = MOST) -> bool:
    """Whether a value is an integer (no bool, no float) within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def require_neutral(given: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields that ask for what this runtime does not do.

    Args:
        given: the fields of a config.
        neutral: the values that change nothing, by field; an absent field changes nothing.

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
    """A config's fields, with transformers' defaults where it leaves one out."""

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, self.defaults.get(name))

    def whole(self, name: str, least: int = 1, most: int = MOST) -> int:
        """A size or a count."""
        value = self[name]
        return value if is_whole(value, least, most) else refuse(name, f"a whole number from {least} to {most}", value)

    def number(self, name: str) -> float:
        """A positive, finite number."""
        value = self[name]
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST:
            return value
        refuse(name, "a positive number", value)

    def number_or_none(self, name: str) -> float | None:
        return None if self[name] is None else self.number(name)

    def require_supported(self) -> None:
        """Refuse a feature that transformers would act on and this runtime does not have.

        Raises:
            CheckpointError: a field asks for one; it is named.
        """
        require_neutral(self.given, _NEUTRAL)

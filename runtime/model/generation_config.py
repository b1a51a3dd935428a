"""A checkpoint's generation settings: its special token ids, what it does to logits before a token is chosen, and
refusal of anything else that changes tokens.

transformers reads them from generation_config.json or, where that is absent, from config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.model.config_fields import MAX_INTEGER, MAX_NUMBER, is_integer, refuse, require_neutral

MAX_STOP_IDS = 32  # a decode step compares each token with all of them

# Fields that can change the tokens of `generate(do_sample=False)` and are not honoured, each with the values that
# change nothing (null never does).
# Fields for sampling, beams and assistants have no effect on greedy decoding, the caller's arguments override
# `max_new_tokens` and `max_length`, and transformers ignores unknown fields.
_SAME_TOKENS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        *("assistant_early_exit", "constraints", "dola_layers", "force_words_ids", "max_time"),
        *("prompt_lookup_num_tokens", "speculation_type", "stop_strings", "watermarking_config"),
    ),
    (),
) | {
    "cache_implementation": (
        *("dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked"),
        *("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked"),
    ),
    "guidance_scale": (1.0,),
    "is_assistant": (False,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
    "use_mtp": (False,),
}
_NEUTRAL = {name: (None, *values) for name, values in _SAME_TOKENS.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _is_id(value: Any) -> bool:
    return is_integer(value, 0)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_id, value))


def _is_pair(value: Any, first: Callable[[Any], bool], second: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 2 and first(value[0]) and second(value[1])


# Fields that are honoured (runtime/sampling/processors.py), each with the values that change nothing, what the value
# must be otherwise, and a test of that.
_Field = tuple[tuple[Any, ...], str, Callable[[Any], bool]]
_PENALTY: _Field = ((1.0,), "a number above 0", lambda value: _is_number(value) and value > 0)
_COUNT: _Field = ((0,), "an integer from 0 on", _is_id)
_IDS: _Field = (([],), "a list of token ids", _are_ids)
HONOURED: dict[str, _Field] = {
    "bad_words_ids": (
        (),
        "a list of lists of token ids",
        lambda value: isinstance(value, list) and bool(value) and all(map(_are_ids, value)),
    ),
    "begin_suppress_tokens": _IDS,
    "encoder_no_repeat_ngram_size": _COUNT,
    "encoder_repetition_penalty": _PENALTY,
    "exponential_decay_length_penalty": (
        (),
        "a list of an integer and a number",
        lambda value: _is_pair(value, _is_id, _is_number),
    ),
    "forced_bos_token_id": ((), "a token id", _is_id),
    "forced_eos_token_id": ((), "a token id or a list of them", lambda value: _is_id(value) or _are_ids(value)),
    "min_length": _COUNT,
    "min_new_tokens": _COUNT,
    "no_repeat_ngram_size": _COUNT,
    "renormalize_logits": ((False,), "true or false", lambda value: value is True),
    "repetition_penalty": _PENALTY,
    "sequence_bias": (
        ([],),
        "a list of pairs, each of a list of token ids and a number",
        lambda value: isinstance(value, list) and all(_is_pair(pair, _are_ids, _is_number) for pair in value),
    ),
    "suppress_tokens": _IDS,
}


@dataclass(frozen=True)
class GenerationConfig:
    """The token ids that begin, pad and end a text; there may be no BOS and no stop token. `processors` is what is done
    to logits: fields of transformers' GenerationConfig, by name, without those that change nothing."""

    bos_token_id: int | None
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    processors: Mapping[str, Any]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None, vocab: int) -> GenerationConfig:
        """Read the parsed `config.json` and `generation_config.json` as transformers does.

        Args:
            config: all of `config.json`; the outer fields of a multimodal one take precedence over `text_config`.
            generation: if there is such a file, it alone decides; None if there is none.
            vocab: size of the vocabulary.

        Raises:
            CheckpointError: a field asks for something that is not honoured, or is not what it has to be; it is named.

        Source: transformers' generation/configuration_utils.py (`GenerationConfig.from_model_config`).
        """
        nested = config.get("text_config")
        nested = nested if isinstance(nested, Mapping) else {}
        merged = {**nested, **{name: value for name, value in config.items() if value is not None}}
        fields = merged if generation is None else generation
        require_neutral(fields, _NEUTRAL)
        stops = _stop_ids(fields.get("eos_token_id"))
        pad = fields.get("pad_token_id", nested.get("pad_token_id", config.get("pad_token_id", 0)))
        if pad is None:  # transformers then pads with the first stop token
            pad = next((stop for stop in stops if stop < vocab), 0)
        elif not is_integer(pad, 0, vocab - 1):
            refuse("pad_token_id", f"an id below {vocab}", pad)
        bos = nested.get("bos_token_id", config.get("bos_token_id", 2))
        if bos is not None and not is_integer(bos, 0):
            refuse("bos_token_id", "a token id or null", bos)
        return cls(bos, pad, stops, _processors(fields))


def _processors(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, (neutral, expected, is_valid) in HONOURED.items():
        value = fields.get(name)
        if value is None or value in neutral:
            continue
        if not is_valid(value):
            refuse(name, expected, value)
        found[name] = value
    return found


def _stop_ids(given: Any) -> tuple[int, ...]:
    if given is None:
        return ()
    ids = given if isinstance(given, list) else [given]
    if not all(is_integer(stop, 0) for stop in ids):
        refuse("eos_token_id", f"a token id from 0 to {MAX_INTEGER}, a list of them or null", given)
    unique = tuple(dict.fromkeys(ids))
    if len(unique) > MAX_STOP_IDS:
        refuse("eos_token_id", f"at most {MAX_STOP_IDS} token ids", given)
    return unique

"""A checkpoint's generation settings: its special token ids, and refusal of anything beyond plain greedy decoding.

transformers reads them from generation_config.json or, where that is absent, from config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.model.config_fields import MAX_INTEGER, is_integer, refuse, require_neutral

MAX_STOP_IDS = 32  # a decode step compares each token with all of them

# Fields that can change the tokens of `generate(do_sample=False)`, each with the values that do not (null never does).
# Fields for sampling, beams and assistants have no effect on greedy decoding, the caller's arguments override
# `max_new_tokens` and `max_length`, and transformers ignores unknown fields.
_SAME_TOKENS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        *("assistant_early_exit", "bad_words_ids", "constraints", "dola_layers"),
        *("exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id"),
        *("max_time", "prompt_lookup_num_tokens", "sequence_bias", "speculation_type"),
        *("stop_strings", "watermarking_config"),
    ),
    (),
) | {
    "begin_suppress_tokens": ([],),
    "cache_implementation": (
        *("dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked"),
        *("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked"),
    ),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    "is_assistant": (False,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "renormalize_logits": (False,),
    "repetition_penalty": (1.0,),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "use_mtp": (False,),
}
_NEUTRAL = {name: (None, *values) for name, values in _SAME_TOKENS.items()}


@dataclass(frozen=True)
class GenerationConfig:
    """The token ids that begin, pad and end a text; there may be no BOS and no stop token."""

    bos_token_id: int | None
    pad_token_id: int
    stop_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None, vocab: int) -> GenerationConfig:
        """Read the parsed `config.json` and `generation_config.json` as transformers does.

        Args:
            config: all of `config.json`; the outer fields of a multimodal one take precedence over `text_config`.
            generation: if there is such a file, it alone decides; None if there is none.
            vocab: size of the vocabulary.

        Raises:
            CheckpointError: a field asks for more than plain greedy decoding, or is not a token id; it is named.

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
        return cls(bos, pad, stops)


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

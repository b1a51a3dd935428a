"""What a checkpoint says of generation: its special token ids, and whether it asks for more than plain greedy decoding.

transformers takes it from generation_config.json or, where there is none, from config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.model.config_fields import MOST, is_whole, refuse, require_neutral

MAX_STOP_IDS = 32  # that a decode step compares each token with

# Fields that change the tokens of `generate(do_sample=False)`, each with the values that do not; null, which leaves a
# field to its default, never does. Of the others those for sampling, beams and assistants do nothing in a greedy run,
# `max_new_tokens` and `max_length` give way to the caller's own argument, and transformers ignores unknown ones.
_SAME_TOKENS: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "bad_words_ids": (),
    "begin_suppress_tokens": ([],),
    "cache_implementation": (
        "dynamic",
        "static",
        "hybrid",
        "sliding_window",
        "hybrid_chunked",
        "offloaded",
        "offloaded_static",
        "offloaded_hybrid",
        "offloaded_hybrid_chunked",
    ),
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "is_assistant": (False,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "renormalize_logits": (False,),
    "repetition_penalty": (1.0,),
    "sequence_bias": (),
    "speculation_type": (),
    "stop_strings": (),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "use_mtp": (False,),
    "watermarking_config": (),
}
_NEUTRAL = {name: (None, *values) for name, values in _SAME_TOKENS.items()}


@dataclass(frozen=True)
class GenerationConfig:
    """The token ids that begin, pad and end a text; there may be none that begins or ends it."""

    bos_token_id: int | None
    pad_token_id: int
    stop_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None, vocab: int) -> GenerationConfig:
        """Read the parsed `config.json` and `generation_config.json` as transformers does.

        Args:
            config: the whole of `config.json`; of a multimodal one its own fields come before its `text_config`'s.
            generation: None where the checkpoint has no such file. Where it has one, that alone decides.
            vocab: ids in the vocabulary.

        Raises:
            CheckpointError: a field asks for what is not plain greedy decoding, or holds no token id; it is named.

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
        elif not is_whole(pad, 0, vocab - 1):
            refuse("pad_token_id", f"an id below {vocab}", pad)
        bos = nested.get("bos_token_id", config.get("bos_token_id", 2))
        if bos is not None and not is_whole(bos, 0):
            refuse("bos_token_id", "a token id or null", bos)
        return cls(bos, pad, stops)


def _stop_ids(given: Any) -> tuple[int, ...]:
    if given is None:
        return ()
    ids = given if isinstance(given, list) else [given]
    if not all(is_whole(stop, 0) for stop in ids):
        refuse("eos_token_id", f"a token id from 0 to {MOST}, a list of them or null", given)
    unique = tuple(dict.fromkeys(ids))
    if len(unique) > MAX_STOP_IDS:
        refuse("eos_token_id", f"at most {MAX_STOP_IDS} token ids", given)
    return unique

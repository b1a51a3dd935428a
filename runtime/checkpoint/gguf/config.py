"""The config.json equivalent to a GGUF file's metadata.

Absent keys get llama.cpp's defaults for the architecture (load_hparams for gemma, gemma2 and gemma3), which are not
always transformers'. Other keys that would change the result are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.checkpoint.gguf.file import GgufFile
from runtime.checkpoint.gguf.tokenizer import stop_token_ids, token_id
from runtime.errors import CheckpointError
from runtime.model.config_fields import shown

MAX_LAYERS = 512  # llama.cpp's own limit
_SIZES = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *("rope.scaling.factor", "rope.scaling.type"),
}
_SLIDING = {"attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping"}
_USED = {
    "gemma": _SIZES | {"attention.sliding_window"},  # ignored by all readers of Gemma 1
    "gemma2": _SIZES | _SLIDING | {"attn_logit_softcapping", "rope.freq_base_swa"},
    # rope.global and rope.local: Ollama's names.
    "gemma3": _SIZES | _SLIDING | {"rope.freq_base_swa", "rope.global.freq_base", "rope.local.freq_base"},
}
# Keys in some files that do not change the result: with any value, or with the one given here.
_IDLE = {"vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
_IDLE_AT = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.shared_kv_layers": 0,
    "attn_logit_softcapping": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0,
    "pooling_type": 0,
    "rope.scaling.attn_factor": 1,
}
_IDLE_PREFIXES = ("vision.", "mm.")  # a multimodal model's vision tower
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The `config.json` equivalent to a GGUF file's metadata.

    Raises:
        CheckpointError: the architecture is not gemma, gemma2 or gemma3; a size is missing or malformed; an unknown key
            would change the result.
    """
    family = file.metadata.get("general.architecture")
    if not isinstance(family, str) or family not in _USED:
        raise CheckpointError(f"GGUF architecture must be gemma, gemma2 or gemma3, got {shown(family)}: {file.path}")
    values = _Values(file, family)
    layers = values.size("block_count")
    if layers > MAX_LAYERS:
        raise CheckpointError(f"{family}.block_count must be at most {MAX_LAYERS}, got {layers}: {file.path}")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"the GGUF file has no token_embd.weight: {file.path}")
    hidden, heads = values.size("embedding_length"), values.size("attention.head_count")
    head_dim = values.size("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if values.size(name, head_dim) != head_dim:
            raise CheckpointError(
                f"{family}.{name} must be attention.key_length, {head_dim}, got {values.size(name)}: {file.path}"
            )
    config: dict[str, Any] = {
        "architectures": ["Gemma3ForCausalLM" if family == "gemma3" else f"{family.capitalize()}ForCausalLM"],
        "model_type": "gemma3_text" if family == "gemma3" else family,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": values.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": values.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": values.size("context_length"),
        "torch_dtype": "bfloat16",
        "transformers_version": "5.0.0",  # if absent, transformers warns about the tokenizer
        "hidden_act" if family == "gemma" else "hidden_activation": "gelu_pytorch_tanh",
    }
    config |= _rope(values, family)
    if family != "gemma":
        # Not stored: the largest models scale by hidden / heads, the others by head_dim.
        config["query_pre_attn_scalar"] = hidden // heads if layers == _LARGEST[family] else head_dim
        config |= _attention(values, family, layers)
    return config | _token_ids(file.metadata)


class _Values:
    """The keys of one architecture, each checked when it is read."""

    def __init__(self, file: GgufFile, family: str) -> None:
        self._path, self._prefix = file.path, f"{family}."
        self._values = {
            key.removeprefix(self._prefix): value
            for key, value in file.metadata.items()
            if key.startswith(self._prefix)
        }
        for name, value in self._values.items():
            idle = name in _IDLE or name.startswith(_IDLE_PREFIXES) or (name in _IDLE_AT and value == _IDLE_AT[name])
            if name not in _USED[family] and not idle:
                raise CheckpointError(
                    f"metadata {shown(self._prefix + name)} is not supported, got {shown(value)}: {file.path}"
                )

    def get(self, name: str) -> Any:
        """The unchecked value of a key, or None."""
        return self._values.get(name)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer, stored once or as equal values for every layer."""
        value = self._present(name, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if type(value) is not int or value < 1:
            raise self.wrong(name, "a positive integer, the same for every layer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; of a float32, the shortest decimal that rounds to it."""
        value = self._present(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.wrong(name, "a positive number")
        single = np.float32(value)
        return float(str(single)) if single == value else float(value)

    def wrong(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._prefix}{name} must be {expected}, got {shown(self.get(name))}: {self._path}")

    def _present(self, name: str, default: Any) -> Any:
        value = self._values.get(name, default)
        if value is None:
            raise CheckpointError(f"the GGUF file has no {self._prefix}{name}: {self._path}")
        return value


def _rope(values: _Values, family: str) -> dict[str, Any]:
    base = _either(values, "rope.freq_base", "rope.global.freq_base", 10_000.0)
    # Gemma 2's sliding layers share the base; Gemma 3's have their own.
    slides = bool(values.get("attention.sliding_window"))
    shared = family == "gemma2" or (family == "gemma3" and not slides)
    local = _either(values, "rope.freq_base_swa", "rope.local.freq_base", base if shared else 10_000.0)
    if family == "gemma2" and local != base:
        raise values.wrong("rope.freq_base_swa", f"rope.freq_base, {base}")
    config: dict[str, Any] = {"rope_theta": base} | ({"rope_local_base_freq": local} if family == "gemma3" else {})
    scaling = values.get("rope.scaling.type") or "linear"
    if scaling not in ("none", "linear"):
        raise values.wrong("rope.scaling.type", "'none' or 'linear'")
    factors = {
        values.number(name)
        for name in ("rope.scaling.factor", "rope.scale_linear")
        if values.get(name) not in (None, 0)
    }
    if len(factors) > 1:
        raise values.wrong("rope.scale_linear", "the same as rope.scaling.factor")
    if scaling == "linear" and factors not in (set(), {1.0}):
        config["rope_scaling"] = {"rope_type": "linear", "factor": factors.pop()}
    return config


def _attention(values: _Values, family: str, layers: int) -> dict[str, Any]:
    """Softcaps, the sliding window and which layers slide."""
    capped = family == "gemma2"
    config: dict[str, Any] = {
        "attn_logit_softcapping": values.number("attn_logit_softcapping", 50.0) if capped else None
    }
    final = values.get("final_logit_softcapping") or (30.0 if capped else None)
    config["final_logit_softcapping"] = final and values.number("final_logit_softcapping", final)

    window = values.get("attention.sliding_window")
    pattern = values.get("attention.sliding_window_pattern")
    if family == "gemma3" and not window:
        slides = [False] * layers
        window = values.size("context_length")  # unused, but transformers requires a number
    else:
        window = values.size("attention.sliding_window", 4096 if family == "gemma2" else None)
        slides = _pattern(values, pattern, {"gemma2": 2, "gemma3": 6}[family], layers)
    types = ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    return config | {"sliding_window": window, "layer_types": types}


def _pattern(values: _Values, pattern: Any, default: int, layers: int) -> list[bool]:
    """Which layers slide: all but every n-th (all for 0), or as listed."""
    if isinstance(pattern, list):
        if len(pattern) != layers or any(item not in (0, 1) for item in pattern):
            raise values.wrong("attention.sliding_window_pattern", f"a number or {layers} booleans")
        return [bool(item) for item in pattern]
    every = default if pattern is None else pattern
    if type(every) is not int or every < 0:
        raise values.wrong("attention.sliding_window_pattern", f"a number or {layers} booleans")
    return [every == 0 or (layer + 1) % every != 0 for layer in range(layers)]


def _either(values: _Values, name: str, other: str, default: float) -> float:
    """A number stored under either of two keys; if both are present, they must agree."""
    given = {values.number(key) for key in (name, other) if values.get(key) is not None}
    if len(given) > 1:
        raise values.wrong(other, f"the same as {name}, {values.get(name)}")
    return given.pop() if given else default


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    bos, padding = token_id(metadata, "bos"), token_id(metadata, "padding")
    stop = stop_token_ids(metadata)
    return {
        "bos_token_id": 2 if bos is None else bos,
        "eos_token_id": stop[0] if len(stop) == 1 else stop,
        "pad_token_id": padding or 0,
    }

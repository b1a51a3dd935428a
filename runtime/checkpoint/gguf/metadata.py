"""The metadata of a GGUF file that holds a model: the inverse of config.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from runtime.checkpoint.gguf.config import hf_config
from runtime.model.config import ModelConfig


def sizes_of(config: ModelConfig) -> dict[str, Any]:
    """The keys of an architecture, as llama.cpp's converter writes them."""
    windows = [layer.window for layer in config.layers if layer.window is not None]
    bases = {layer.window is not None: layer.rope.theta for layer in config.layers}
    first = config.layers[0]
    sizes: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden,
        "block_count": len(config.layers),
        "feed_forward_length": config.intermediate,
        "attention.head_count": first.heads,
        "attention.head_count_kv": first.kv_heads,
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": bases.get(False),
        "rope.freq_base_swa": bases.get(True) if config.family == "gemma3" else None,
        "attention.sliding_window": windows[0] if windows else None,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "vocab_size": config.vocab,
    }
    factors = {layer.rope.factor for layer in config.layers if layer.rope.rope_type == "linear"}
    if factors:
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(max(factors))}
    return {f"{config.family}.{key}": value for key, value in sizes.items() if value is not None}


def differing_fields(config: ModelConfig, metadata: Mapping[str, Any]) -> list[str]:
    """The fields of a config for which a reader of its file would get other values. A GGUF file does not say which
    layers slide or how attention is scaled, for instance: its readers infer both from the family and size."""
    file: Any = SimpleNamespace(
        path="its GGUF file",
        metadata={"general.architecture": config.family, **metadata},
        tensors={"token_embd.weight": SimpleNamespace(shape=(config.vocab, config.hidden))},
    )
    read = ModelConfig.from_hf(hf_config(file))
    names = {field.name for field in dataclasses.fields(config)}
    return sorted(name for name in names if getattr(read, name) != getattr(config, name))

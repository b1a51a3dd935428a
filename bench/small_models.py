"""Small random Gemma models in Hugging Face's layout: odd sizes, and a window that any prompt soon outgrows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 499
WINDOW = 16
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 84,
    "intermediate_size": 147,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_SLIDING = {"query_pre_attn_scalar": 20, "sliding_window": WINDOW}
_LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _SLIDING),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _SLIDING | {"layer_types": _LAYER_TYPES}),
}


def save_small_model(family: str, folder: Path, *, seed: int = 0, **overrides: Any) -> type:
    """Writes a model into a folder and returns its class in transformers.

    The spread of the weights is chosen so that a greedy run wanders: with the usual initialisation a tied head repeats
    one token for ever, and equality would prove nothing.

    Args:
        family: "gemma", "gemma2" or "gemma3".
        folder: where config and weights go, in float32.
        seed: of the weights.
        overrides: fields of Hugging Face's config.
    """
    import torch
    import transformers

    config_name, model_name, settings = _FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**_SHAPE | settings | overrides))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(1.0, 0.5)
            elif "embed" in name:
                weight.normal_(0.0, 0.02)
            else:
                weight.normal_(0.0, 2.0 * weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return type(model)

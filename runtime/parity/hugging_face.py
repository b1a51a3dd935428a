"""Hugging Face's own model as it reads a checkpoint itself, its config, and its greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.hugging_face.shared_weights import attention_of, read_model, ready
from runtime.model.config import ModelConfig
from runtime.model.model import Model


def from_folder(folder: Path, model: Model) -> Any:
    """Hugging Face's model as it reads a checkpoint itself, in the dtype and on the device of ours.

    Args:
        folder: the checkpoint that `model` was loaded from.
        model: determines dtype, device and family.

    Raises:
        ValueError: the installed transformers does not run this model with the family's attention.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    attention = attention_of(model.config)
    # With the checkpoint's own generation config, whose fields may change greedy tokens.
    return ready(read_model(transformers.AutoModelForCausalLM, config, model, attention, folder), model, attention)


def generation_config_of(folder: Path) -> Any:
    """The checkpoint's own generation config; None where it has none."""
    import transformers

    if not (folder / "generation_config.json").is_file():
        return None
    return transformers.GenerationConfig.from_pretrained(folder)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Hugging Face's config for an architecture: the inverse of `ModelConfig.from_hf`."""
    first = config.layers[0]  # Gemma 1 to 3 have one size of layer
    fields: dict[str, Any] = {
        "model_type": "gemma3_text" if config.family == "gemma3" else config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.stop_token_ids) or None,
        "tie_word_embeddings": config.tied,
    }
    types = ["full_attention" if layer.window is None else "sliding_attention" for layer in config.layers]
    ropes = {
        kind: {"rope_type": layer.rope.rope_type, "rope_theta": layer.rope.theta}
        | ({"factor": layer.rope.factor} if layer.rope.rope_type == "linear" else {})
        for kind, layer in zip(types, config.layers, strict=True)
    }
    if config.family == "gemma":
        return fields | {"hidden_act": "gelu_pytorch_tanh", "rope_parameters": ropes["full_attention"]}
    scalar = config.attention_scale**-2
    windows = {layer.window for layer in config.layers if layer.window is not None}
    return fields | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar,
        "sliding_window": max(windows, default=config.max_position_embeddings),
        "layer_types": types,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "rope_parameters": ropes if config.family == "gemma3" else next(iter(ropes.values())),
    }


def greedy(model: Any, prompt: list[int], count: int, **extra: Any) -> list[int]:
    """Hugging Face's greedy tokens, stop tokens ignored."""
    return _generate(model, [prompt], count, **extra).sequences[0, len(prompt) :].tolist()


def greedy_logits(model: Any, prompt: list[int], count: int, **extra: Any) -> tuple[list[int], torch.Tensor]:
    """As `greedy`, with the logits that each token was picked from: [count, vocab] fp32."""
    out = _generate(model, [prompt], count, output_logits=True, **extra)
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).float()


def greedy_batch(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The tokens of several prompts run as one batch, padded on the left."""
    out = _generate(model, prompts, count)
    return out.sequences[:, max(map(len, prompts)) :].tolist()


def _generate(model: Any, prompts: list[list[int]], count: int, **extra: Any) -> Any:
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = [[0] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * left + [1] * (longest - left) for left in padding]
    return model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **extra,
    )

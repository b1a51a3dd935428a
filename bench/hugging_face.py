"""Hugging Face's model on the weights of one of ours, which the two share: peer and oracle of the benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from runtime.load import Model


def hugging_face(hf_config: dict[str, Any], model: Model) -> Any:
    """Hugging Face's model of a config on the very same weights, which it shares."""
    config = transformers.AutoConfig.for_model(**hf_config)
    # Gemma 2's softcap needs eager attention in the transformers versions that leave it out elsewhere.
    attention = "eager" if model.config.family == "gemma2" else "sdpa"
    with torch.device(model.device):
        theirs = transformers.AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=attention
        ).eval()
    c, tensors = model.config, dict[str, torch.Tensor | None]()
    tensors["model.embed_tokens.weight"] = model.weights.embedding
    tensors["lm_head.weight"] = model.weights.embedding
    tensors["model.norm.weight"] = model.weights.final_norm
    for index, layer in enumerate(model.weights.layers):
        prefix = f"model.layers.{index}."
        parts = layer.qkv.split([count * c.head_dim for count in (c.heads, c.kv_heads, c.kv_heads)])
        for part, weight in zip("qkv", parts, strict=True):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = weight
        tensors[f"{prefix}self_attn.o_proj.weight"] = layer.output
        gate_weight, up_weight = layer.gate_up.chunk(2)
        tensors[f"{prefix}mlp.gate_proj.weight"], tensors[f"{prefix}mlp.up_proj.weight"] = gate_weight, up_weight
        tensors[f"{prefix}mlp.down_proj.weight"] = layer.down
        tensors[f"{prefix}input_layernorm.weight"] = layer.attention_norm
        if layer.post_attention_norm is None:
            tensors[f"{prefix}post_attention_layernorm.weight"] = layer.mlp_norm
        else:
            tensors[f"{prefix}post_attention_layernorm.weight"] = layer.post_attention_norm
            tensors[f"{prefix}pre_feedforward_layernorm.weight"] = layer.mlp_norm
            tensors[f"{prefix}post_feedforward_layernorm.weight"] = layer.post_mlp_norm
        if layer.q_norm is not None:
            tensors[f"{prefix}self_attn.q_norm.weight"] = layer.q_norm
            tensors[f"{prefix}self_attn.k_norm.weight"] = layer.k_norm
    theirs.load_state_dict(tensors, strict=True, assign=True)
    return theirs


def greedy(model: Any, prompt: list[int], count: int, **extra: Any) -> list[int]:
    """Hugging Face's greedy tokens, stop tokens ignored."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **extra,
    )
    return out[0, len(prompt) :].tolist()

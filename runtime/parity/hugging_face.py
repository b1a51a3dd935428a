"""Hugging Face's own model: read from a checkpoint, or built on weights that it shares with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.errors import InvalidArgument
from runtime.kernels.linear import aligned
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
    return _ready(_read(transformers.AutoModelForCausalLM, config, model, attention, folder), model, attention)


def hugging_face(hf_config: dict[str, Any], model: Model, generation_config: Any = None) -> Any:
    """Hugging Face's model of a config on our weights, which it shares; without a generation config, with the default
    one of transformers."""
    import transformers

    config = transformers.AutoConfig.for_model(**hf_config)
    family = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    attention, weights = attention_of(model.config), named_weights(model)
    # Given weights, transformers skips the random initialisation, which takes a minute for a large model.
    theirs = _read(family, config, model, attention, None, state_dict=weights)
    theirs.load_state_dict(weights, strict=True, assign=True)
    theirs.generation_config = generation_config or transformers.GenerationConfig()
    return _ready(theirs, model, attention)


def align_weights(theirs: Any) -> Any:
    """Copies weights that `from_pretrained` maps from a file to memory aligned as PyTorch allocates it, and returns the
    model. In the file, alignment depends on the header's length, and the bits of an fp32 product on alignment: see
    kernels/linear.py."""
    for parameter in theirs.parameters():
        parameter.data = aligned(parameter.data)
    return theirs


def attention_of(config: ModelConfig) -> str:
    """The attention implementation that is Hugging Face's reference for a family."""
    # Some transformers versions apply Gemma 2's softcap in eager attention only.
    return "eager" if config.family == "gemma2" else "sdpa"


def named_weights(model: Model) -> dict[str, torch.Tensor | None]:
    """Our weights under Hugging Face's names: views, nothing is copied."""
    tensors: dict[str, torch.Tensor | None] = {}
    tensors["model.embed_tokens.weight"] = model.weights.embedding
    tensors["lm_head.weight"] = model.weights.head
    tensors["model.norm.weight"] = model.weights.final_norm
    for index, layer in enumerate(model.weights.layers):
        prefix = f"model.layers.{index}."
        for part, weight in zip("qkv", layer.qkv.split(model.config.layers[index].qkv_widths), strict=True):
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
    return tensors


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


def _read(kind: Any, config: Any, model: Model, attention: str, source: Path | None, **extra: Any) -> Any:
    """Hugging Face's `from_pretrained`, without its progress bar."""
    from transformers.utils import logging

    if config.model_type == "gemma":
        # Early checkpoints say "gelu" but mean the tanh form; transformers up to 5.17 takes "gelu" literally.
        config.hidden_act = "gelu_pytorch_tanh"
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(source, config=config, dtype=model.dtype, attn_implementation=attention, **extra)
    finally:
        if shown:
            logging.enable_progress_bar()


def _ready(theirs: Any, model: Model, attention: str) -> Any:
    import transformers

    align_weights(theirs)
    actual = theirs.config._attn_implementation
    if actual != attention:
        raise InvalidArgument(
            f"the comparison is not possible: transformers {transformers.__version__} runs this model with {actual} "
            f"attention, expected {attention}"
        )
    return theirs.to(model.device).eval()

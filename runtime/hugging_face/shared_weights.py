"""transformers' model of an architecture on our weights: it holds views of them, and nothing is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.errors import InvalidArgument
from runtime.kernels.linear import aligned
from runtime.model.config import ModelConfig
from runtime.model.model import Model
from runtime.model.weights import Matrix


def hugging_face(hf_config: dict[str, Any], model: Model, generation_config: Any = None) -> Any:
    """Hugging Face's model for a config, sharing our weights; without a generation config, it gets transformers'
    default."""
    import transformers

    # It gets our weights as values, however the checkpoint stores them.
    fields = {name: value for name, value in hf_config.items() if name != "quantization_config"}
    config = transformers.AutoConfig.for_model(**fields)
    family = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    attention, weights = attention_of(model.config), named_weights(model)
    # Given weights, transformers skips the random initialisation, which takes a minute for a large model.
    theirs = read_model(family, config, model, attention, None, state_dict=weights)
    theirs.load_state_dict(weights, strict=True, assign=True)
    theirs.generation_config = generation_config or transformers.GenerationConfig()
    return ready(theirs, model, attention)


def named_weights(model: Model) -> dict[str, torch.Tensor | None]:
    """Our weights under Hugging Face's names: views, nothing is copied; but for a quantised matrix, its values in the
    model's dtype."""

    def values(weight: Matrix) -> torch.Tensor:
        return weight if isinstance(weight, torch.Tensor) else weight.dequantized().to(model.dtype)

    tensors: dict[str, torch.Tensor | None] = {}
    embedding = tensors["model.embed_tokens.weight"] = values(model.weights.embedding)
    is_tied = model.weights.head is model.weights.embedding
    tensors["lm_head.weight"] = embedding if is_tied else values(model.weights.head)
    tensors["model.norm.weight"] = model.weights.final_norm
    for index, layer in enumerate(model.weights.layers):
        prefix = f"model.layers.{index}."
        for part, weight in zip("qkv", layer.qkv.split(model.config.layers[index].qkv_widths), strict=True):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = values(weight)
        tensors[f"{prefix}self_attn.o_proj.weight"] = values(layer.output)
        gate_weight, up_weight = layer.gate_up.split(len(layer.gate_up) // 2)
        tensors[f"{prefix}mlp.gate_proj.weight"] = values(gate_weight)
        tensors[f"{prefix}mlp.up_proj.weight"] = values(up_weight)
        tensors[f"{prefix}mlp.down_proj.weight"] = values(layer.down)
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


def align_weights(theirs: Any) -> Any:
    """Copies weights that `from_pretrained` memory-maps from a file into memory aligned as PyTorch allocates it, and
    returns the model. In the file, alignment depends on the header's length, and the bits of an fp32 product depend on
    alignment: see kernels/linear.py."""
    for parameter in theirs.parameters():
        parameter.data = aligned(parameter.data)
    return theirs


def attention_of(config: ModelConfig) -> str:
    """The attention implementation that is Hugging Face's reference for a family."""
    # Some transformers versions apply Gemma 2's softcap in eager attention only.
    return "eager" if config.family == "gemma2" else "sdpa"


def read_model(kind: Any, config: Any, model: Model, attention: str, source: Path | None, **extra: Any) -> Any:
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


def ready(theirs: Any, model: Model, attention: str) -> Any:
    import transformers

    align_weights(theirs)
    actual = theirs.config._attn_implementation
    if actual != attention:
        raise InvalidArgument(
            f"the comparison is not possible: transformers {transformers.__version__} runs this model with {actual} "
            f"attention, expected {attention}"
        )
    return theirs.to(model.device).eval()

"""The weights of a decoder as the kernels want them: packed once at load, row-major, one contiguous tensor each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.checkpoint import Checkpoint
from runtime.config import ModelConfig
from runtime.errors import CheckpointError
from runtime.huge_pages import Slab


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer. Norm weights are stored as in the checkpoint (the multiplier is 1 + weight).

    Gemma 1 has no norm after its branches (`post_attention_norm` and `post_mlp_norm` are None; what Hugging Face
    calls its post_attention_layernorm is `mlp_norm` here); Gemma 3 alone has `q_norm` and `k_norm`.
    """

    attention_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]: all q rows, then k, then v
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None  # [head_dim]
    output: torch.Tensor  # [hidden, heads * head_dim]
    post_attention_norm: torch.Tensor | None = None  # [hidden]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]: all gate rows, then up
    down: torch.Tensor  # [hidden, intermediate]
    post_mlp_norm: torch.Tensor | None = None  # [hidden]


@dataclass(frozen=True)
class ModelWeights:
    """A whole decoder; the LM head is tied to the embedding table."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [hidden]


# Which of a family's stored norms is which field.
_SANDWICH_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_NORMS = {
    "gemma": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "gemma2": _SANDWICH_NORMS,
    "gemma3": _SANDWICH_NORMS | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
}
# Where the decoder's tensors start: causal LM, multimodal before and since transformers 4.52, bare decoder.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

_Parts = dict[str, tuple[int, ...]]  # stored tensors that are stacked by rows, in order: name -> shape


def layer_shapes(config: ModelConfig) -> dict[str, _Parts]:
    """For each field of `LayerWeights` that the family has: the stored tensors (name within the layer -> shape)
    that are stacked by rows to make it."""
    hidden, mlp = config.hidden, config.intermediate
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    fields: dict[str, _Parts] = {
        "qkv": {
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
        },
        "output": {"self_attn.o_proj.weight": (hidden, q)},
        "gate_up": {"mlp.gate_proj.weight": (mlp, hidden), "mlp.up_proj.weight": (mlp, hidden)},
        "down": {"mlp.down_proj.weight": (hidden, mlp)},
    }
    for field, stored in _NORMS[config.family].items():
        size = config.head_dim if field in ("q_norm", "k_norm") else hidden
        fields[field] = {f"{stored}.weight": (size,)}
    return fields


def stored_shapes(config: ModelConfig, prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this architecture must hold."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (config.vocab, config.hidden),
        f"{prefix}norm.weight": (config.hidden,),
    }
    per_layer = [part for parts in layer_shapes(config).values() for part in parts.items()]
    for layer in range(config.layers):
        shapes.update({f"{prefix}layers.{layer}.{name}": shape for name, shape in per_layer})
    return shapes


def check_stored(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """Check names and shapes of a checkpoint against an architecture, reading headers only.

    Returns:
        The prefix of the decoder's tensor names.

    Raises:
        CheckpointError: a tensor is missing, surplus or misshapen; it is named. The vision part of a multimodal
            checkpoint, old rotary buffers and a copy of the tied head are known and skipped.
    """
    found = [prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in checkpoint.tensors]
    prefix = found[0] if found else _PREFIXES[0]

    def ignored(name: str) -> bool:
        vision = "language_model" in prefix and name.startswith(_VISION)
        return vision or name in _HEADS or name.endswith("rotary_emb.inv_freq")

    checkpoint.check_shapes(stored_shapes(config, prefix), ignored)
    return prefix


def read_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
) -> ModelWeights:
    """Read, convert and pack a checkpoint's weights.

    Args:
        checkpoint: the opened files.
        config: the architecture they must match.
        device: where the weights go.
        dtype: what they are converted to.
        progress: called with the number of stored bytes after each slice.

    Returns:
        The packed weights, in one allocation.

    Raises:
        CheckpointError: a tensor is missing, surplus, misshapen or not finite, or a stored LM head differs from the
            embedding table it is tied to.
    """
    prefix = check_stored(checkpoint, config)
    for head in _HEADS:
        if head in checkpoint.tensors and not checkpoint.equal(head, f"{prefix}embed_tokens.weight"):
            raise CheckpointError(f"tensor {head} differs from the embedding table it is tied to")

    fields = layer_shapes(config)
    table: _Parts = {"embed_tokens.weight": (config.vocab, config.hidden)}
    norm: _Parts = {"norm.weight": (config.hidden,)}
    tensors = [table, *[parts for _ in range(config.layers) for parts in fields.values()], norm]
    slab = Slab([_packed_shape(parts) for parts in tensors], dtype, device)

    def read(parts: _Parts, prefix: str) -> torch.Tensor:
        packed = slab.take(_packed_shape(parts))
        for name, rows in zip(parts, packed.split([shape[0] for shape in parts.values()]), strict=True):
            checkpoint.copy_into(rows, prefix + name, progress)
        return packed

    layers = []
    embedding = read(table, prefix)
    for layer in range(config.layers):
        packed = {field: read(parts, f"{prefix}layers.{layer}.") for field, parts in fields.items()}
        layers.append(LayerWeights(**packed))
    return ModelWeights(embedding, tuple(layers), read(norm, prefix))


def _packed_shape(parts: _Parts) -> tuple[int, ...]:
    shapes = list(parts.values())
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])

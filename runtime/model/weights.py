"""A decoder's weights, packed row-major for the kernels, and the tensors that a checkpoint must hold for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kernels.quantized import Matrix
from runtime.kernels.scaled_matrix import ScaledMatrix
from runtime.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerWeights:
    """One layer. Norm weights are stored as in the checkpoint (the multiplier is 1 + weight).

    Gemma 1 has no norm after its branches (`post_attention_norm` and `post_mlp_norm` are None; what Hugging Face
    calls its post_attention_layernorm is `mlp_norm` here); Gemma 3 alone has `q_norm` and `k_norm`.
    """

    attention_norm: torch.Tensor  # [hidden]
    qkv: Matrix  # [(heads + 2 * kv_heads) * head_dim, hidden]: all q rows, then k, then v
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None  # [head_dim]
    output: Matrix  # [hidden, heads * head_dim]
    post_attention_norm: torch.Tensor | None = None  # [hidden]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: Matrix  # [2 * intermediate, hidden]: all gate rows, then up
    down: Matrix  # [hidden, intermediate]
    post_mlp_norm: torch.Tensor | None = None  # [hidden]

    def __repr__(self) -> str:
        named = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return f"LayerWeights({', '.join(f'{name} {list(tensor.shape)}' for name, tensor in named.items())})"


@dataclass(frozen=True, repr=False)
class ModelWeights:
    """A whole decoder. Where the LM head is tied to the embedding table they are the same tensor."""

    embedding: Matrix  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [hidden]
    head: Matrix  # [vocab, hidden]

    @property
    def parameters(self) -> int:
        """Number of weights, a tied table counted once."""
        return sum(weight.numel() for weight in self._all())

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory, a tied table counted once."""
        return sum(weight.nbytes for weight in self._all())

    @property
    def formats(self) -> str:
        """The formats of quantised matrices in memory: "Q8_0 + Q5_0", on a GPU "int8 + int4"; empty where there are
        none."""
        quantized = [weight for weight in self._all() if not isinstance(weight, torch.Tensor)]
        found = [[w.format] if isinstance(w, ScaledMatrix) else w.formats.split(" + ") for w in quantized]
        return " + ".join(dict.fromkeys(name for names in found for name in names))

    def __repr__(self) -> str:
        values, device = self.formats or self.final_norm.dtype, self.embedding.device
        return f"ModelWeights({len(self.layers)} layers, {self.parameters:,} parameters, {values}, {device})"

    def _all(self) -> list[Matrix]:
        weights = [self.embedding, self.final_norm, *([] if self.head is self.embedding else [self.head])]
        return weights + [weight for layer in self.layers for weight in vars(layer).values() if weight is not None]


# The stored name of each norm of `LayerWeights`, by family.
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
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]  # of stored tensors, by name


def layer_shapes(config: ModelConfig, index: int) -> dict[str, Shapes]:
    """For each field of layer `index`'s `LayerWeights` that the family has: the stored tensors (by name within the
    layer) whose rows are concatenated to pack it."""
    layer, hidden, mlp = config.layers[index], config.hidden, config.intermediate
    q, k, v = layer.qkv_widths
    fields: dict[str, Shapes] = {
        "qkv": {
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (k, hidden),
            "self_attn.v_proj.weight": (v, hidden),
        },
        "output": {"self_attn.o_proj.weight": (hidden, q)},
        "gate_up": {"mlp.gate_proj.weight": (mlp, hidden), "mlp.up_proj.weight": (mlp, hidden)},
        "down": {"mlp.down_proj.weight": (hidden, mlp)},
    }
    for field, stored in _NORMS[config.family].items():
        size = layer.head_dim if field in ("q_norm", "k_norm") else hidden
        fields[field] = {f"{stored}.weight": (size,)}
    return fields


def stored_shapes(config: ModelConfig) -> Shapes:
    """Name (as in a causal LM) and shape of every tensor that a checkpoint of this architecture must hold."""
    shapes: Shapes = {EMBEDDING: (config.vocab, config.hidden), FINAL_NORM: (config.hidden,)}
    if not config.tied:
        shapes[HEAD] = (config.vocab, config.hidden)
    for index in range(len(config.layers)):
        for stored in layer_shapes(config, index).values():
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in stored.items()}
    return shapes


def packed_shape(stored: Shapes) -> tuple[int, ...]:
    """The shape of stored tensors once their rows are concatenated."""
    first, *_ = stored.values()
    return (sum(shape[0] for shape in stored.values()), *first[1:])

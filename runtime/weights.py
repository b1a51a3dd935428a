"""The weights of a decoder as the kernels want them: packed once at load, row-major, one contiguous tensor each."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Norm weights are stored as in the checkpoint (the multiplier is 1 + weight).

    Gemma 1 has no norm after its branches (`post_attention_norm` and `post_mlp_norm` are None; what Hugging Face
    calls its post_attention_layernorm is `mlp_norm` here); Gemma 3 alone has `q_norm` and `k_norm`.
    """

    attention_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]: all q rows, then k, then v
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    output: torch.Tensor  # [hidden, heads * head_dim]
    post_attention_norm: torch.Tensor | None  # [hidden]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]: all gate rows, then up
    down: torch.Tensor  # [hidden, intermediate]
    post_mlp_norm: torch.Tensor | None  # [hidden]


@dataclass(frozen=True)
class ModelWeights:
    """A whole decoder; the LM head is tied to the embedding table."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [hidden]

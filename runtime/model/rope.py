"""Rotary tables: the cosines and sines of every position, computed once."""

from __future__ import annotations

import torch

from runtime.model.config import ModelConfig, RuntimeConfig
from runtime.model.rope_config import RopeConfig


class RopeTables:
    """One (cos, sin) pair for each distinct `RopeConfig` and head_dim of a model, shared by the layers that have them.

    Args:
        config: the architecture.
        runtime: gives the number of positions (max_seq_len), the dtype and the device.
    """

    def __init__(self, config: ModelConfig, runtime: RuntimeConfig) -> None:
        keys = [(layer.rope, layer.head_dim) for layer in config.layers]
        dtype = getattr(torch, runtime.dtype)
        tables = {key: _table(*key, runtime.max_seq_len, dtype, runtime.device) for key in set(keys)}
        self._layers = tuple(tables[key] for key in keys)

    def for_layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's cos and sin tables, each [max_seq_len, head_dim / 2] in the model's dtype. Layers that share them
        get the same tensors."""
        return self._layers[index]


def _table(
    rope: RopeConfig, head_dim: int, positions: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    inverse_frequency = 1.0 / (
        rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    )
    if rope.rope_type == "linear":
        inverse_frequency /= rope.factor
    # Elementwise in fp32 on the device, as Hugging Face computes them: a matmul may use TF32, and another library's cos
    # differs in the last bit. Rounded to the model's dtype once, at the end.
    position = torch.arange(positions, dtype=torch.float32, device=device)
    angle = position[:, None] * inverse_frequency.to(device)
    return angle.cos().to(dtype), angle.sin().to(dtype)

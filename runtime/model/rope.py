"""Rotary tables: the cosines and sines of every position, made once."""

from __future__ import annotations

import torch

from runtime.model.config import ModelConfig, RopeConfig, RuntimeConfig


class RopeTables:
    """One (cos, sin) pair per distinct `RopeConfig` of a model, shared by the layers that use it.

    Args:
        config: the architecture.
        runtime: gives the number of positions (max_seq_len), the dtype and the device.
    """

    def __init__(self, config: ModelConfig, runtime: RuntimeConfig) -> None:
        made = {
            rope: _table(rope, config.head_dim, runtime.max_seq_len, getattr(torch, runtime.dtype), runtime.device)
            for rope in set(config.rope)
        }
        self._layers = tuple(made[rope] for rope in config.rope)

    def for_layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The cos and sin tables of a layer, each [max_seq_len, head_dim / 2] in the model's dtype."""
        return self._layers[index]


def _table(
    rope: RopeConfig, head_dim: int, positions: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    inverse_frequency = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        inverse_frequency /= rope.factor
    # Elementwise in fp32, where Hugging Face takes them (on the device): a matmul may go through TF32, and cos of
    # another library differs in the last bit. Rounded to the model's dtype once, at the end.
    position = torch.arange(positions, dtype=torch.float32, device=device)
    angle = position[:, None] * inverse_frequency.to(device)
    return angle.cos().to(dtype), angle.sin().to(dtype)

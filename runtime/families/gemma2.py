"""Gemma 2: norms before and after each branch, every other layer sliding, softcaps on scores and logits."""

from __future__ import annotations

from runtime.families import sandwich
from runtime.families.sandwich import prefill_layers
from runtime.families.state import DecodeState
from runtime.kernels.ops import Ops
from runtime.model.model import Model

__all__ = ["decode", "prefill_layers"]


def decode(ops: Ops, model: Model, state: DecodeState) -> None:
    """Takes the rows' embeddings in state.x through all layers and picks state.token."""
    config = model.config

    def attention(index: int) -> None:
        sizes, (cos, sin) = config.layers[index], model.rope.for_layer(index)
        ops.decode_attention(
            state.attention_of(sizes),
            state.cache.keys[index],
            state.cache.values[index],
            state.qkv_of(sizes),
            state.position,
            cos,
            sin,
            heads=sizes.heads,
            scale=config.attention_scale,
            window=sizes.window,
            softcap=config.attention_softcap,
        )

    sandwich.decode(ops, model, state, attention)

"""Gemma 3, text: as Gemma 2, with norms on queries and keys and no softcap on scores. Most layers are sliding, and have
a rotary base of their own."""

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
        layer = model.weights.layers[index]
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
            eps=config.rms_norm_eps,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            window=sizes.window,
        )

    sandwich.decode(ops, model, state, attention)

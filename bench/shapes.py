"""The published checkpoints' shapes with random weights: speed depends on the sizes only."""

from __future__ import annotations

from typing import Any

import torch

from runtime.model import memory_plan
from runtime.model.config import ModelConfig, RuntimeConfig, default_prefill_chunk
from runtime.model.model import Model
from runtime.model.published import PUBLISHED
from runtime.model.rope import RopeTables
from runtime.model.threads import available_threads
from runtime.model.weights import LayerWeights, ModelWeights


def random_model(
    name: str, device: str, dtype: str, *, max_seq_len: int, max_batch: int = 1, seed: int = 0, **overrides: Any
) -> Model:
    """A model of a published shape with random weights, generated on the device.

    Args:
        name: one of PUBLISHED.
        device, dtype, max_seq_len, max_batch: as `runtime.load`.
        seed: of the weights.
        overrides: fields of the config to change, to make it small.

    Returns:
        The model, without a tokenizer. Its branches outweigh the embedding in the residual, so that greedy decoding
        does not repeat one token.
    """
    config = ModelConfig.from_hf(PUBLISHED[name] | overrides)
    chunk = default_prefill_chunk(device, eager=False)
    limits = RuntimeConfig(device, dtype, max_seq_len, max_batch, chunk, threads=available_threads())
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, std: float) -> torch.Tensor:
        # Converted row by row: an fp32 copy of the whole table would double the memory.
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        return tensor.normal_(0.0, std, generator=generator)

    hidden = config.hidden
    has_post_norms, has_qk_norm = config.family != "gemma", config.family == "gemma3"

    def norm(size: int) -> torch.Tensor:
        return random(size, std=0.1)

    layers = tuple(
        LayerWeights(
            attention_norm=norm(hidden),
            qkv=random(sum(layer.qkv_widths), hidden, std=hidden**-0.5),
            q_norm=norm(layer.head_dim) if has_qk_norm else None,
            k_norm=norm(layer.head_dim) if has_qk_norm else None,
            output=random(hidden, layer.qkv_widths[0], std=layer.qkv_widths[0] ** -0.5),
            post_attention_norm=norm(hidden) if has_post_norms else None,
            mlp_norm=norm(hidden),
            gate_up=random(2 * config.intermediate, hidden, std=hidden**-0.5),
            down=random(hidden, config.intermediate, std=config.intermediate**-0.5),
            post_mlp_norm=norm(hidden) if has_post_norms else None,
        )
        for layer in config.layers
    )
    embedding = random(config.vocab, hidden, std=0.1 * hidden**-0.5)
    weights = ModelWeights(embedding, layers, norm(hidden), embedding)
    return Model(config, limits, weights, RopeTables(config, limits), None, name, memory_plan.plan(config, limits))

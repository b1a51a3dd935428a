"""The published checkpoints' shapes with random weights: speed depends on the sizes only."""

from __future__ import annotations

from typing import Any

import torch

from runtime.cost.launches import integer_bytes
from runtime.kernels.scaled_matrix import empty_matrix
from runtime.model import memory_plan
from runtime.model.config import ModelConfig, RuntimeConfig, default_prefill_chunk
from runtime.model.model import Model
from runtime.model.published import PUBLISHED
from runtime.model.rope import RopeTables
from runtime.model.threads import available_threads
from runtime.model.weights import LayerWeights, Matrix, ModelWeights

INTEGERS_STD = {"int8": 73.6, "int4": 4.6}  # of integers drawn uniformly


def random_model(
    name: str,
    device: str,
    dtype: str,
    *,
    max_seq_len: int,
    max_batch: int = 1,
    quantize: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Model:
    """A model of a published shape with random weights, generated on the device.

    Args:
        name: one of PUBLISHED.
        device, dtype, max_seq_len, max_batch, quantize: as `runtime.load`; matrices are then those of a GPU.
        seed: of the weights.
        overrides: fields of the config to change, to make it small.

    Returns:
        The model, without a tokenizer. Its branches outweigh the embedding in the residual, so that greedy decoding
        does not repeat one token.
    """
    config = ModelConfig.from_hf(PUBLISHED[name] | overrides)
    chunk = default_prefill_chunk(device, eager=False)
    limits = RuntimeConfig(device, dtype, max_seq_len, max_batch, chunk, threads=available_threads(), quantize=quantize)
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, std: float) -> torch.Tensor:
        # Converted row by row: an fp32 copy of the whole table would double the memory.
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        return tensor.normal_(0.0, std, generator=generator)

    def matrix(outputs: int, columns: int, std: float) -> Matrix:
        if quantize is None:
            return random(outputs, columns, std=std)
        made = empty_matrix(outputs, columns, "int8" if outputs == config.vocab else quantize, torch.device(device))
        scales = made.scale.view(torch.float32 if made.format == "int8" else torch.float16)
        scales.uniform_(0.5, 1.5, generator=generator).mul_(std / INTEGERS_STD[made.format])
        low, high = (-127, 128) if made.format == "int8" else (-(2**15), 2**15)  # of four times four bits
        made.q.random_(low, high, generator=generator)
        return made

    hidden = config.hidden
    has_post_norms, has_qk_norm = config.family != "gemma", config.family == "gemma3"

    def norm(size: int) -> torch.Tensor:
        return random(size, std=0.1)

    layers = tuple(
        LayerWeights(
            attention_norm=norm(hidden),
            qkv=matrix(sum(layer.qkv_widths), hidden, std=hidden**-0.5),
            q_norm=norm(layer.head_dim) if has_qk_norm else None,
            k_norm=norm(layer.head_dim) if has_qk_norm else None,
            output=matrix(hidden, layer.qkv_widths[0], std=layer.qkv_widths[0] ** -0.5),
            post_attention_norm=norm(hidden) if has_post_norms else None,
            mlp_norm=norm(hidden),
            gate_up=matrix(2 * config.intermediate, hidden, std=hidden**-0.5),
            down=matrix(hidden, config.intermediate, std=config.intermediate**-0.5),
            post_mlp_norm=norm(hidden) if has_post_norms else None,
        )
        for layer in config.layers
    )
    embedding = matrix(config.vocab, hidden, std=0.1 * hidden**-0.5)
    weights = ModelWeights(embedding, layers, norm(hidden), embedding)
    plan = memory_plan.plan(config, limits, integer_bytes(config, quantize) if quantize else {})
    return Model(config, limits, weights, RopeTables(config, limits), None, name, plan)

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
from runtime.model.weights import LayerWeights, ModelWeights, layer_shapes, packed_shape

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
        device, dtype, max_seq_len, max_batch, quantize: as `runtime.load`; quantised matrices are those of a GPU.
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

    def random(*shape: int, scale: float = 1.0) -> Any:
        """A norm [size]; or a matrix [outputs, columns], which keeps the spread of what it multiplies, times
        `scale`."""
        std = 0.1 if len(shape) == 1 else scale * shape[1] ** -0.5
        if quantize is None or len(shape) == 1:
            # In its own dtype: an fp32 copy of the whole table would double the memory.
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            return tensor.normal_(0.0, std, generator=generator)
        outputs, columns = shape
        made = empty_matrix(outputs, columns, "int8" if outputs == config.vocab else quantize, torch.device(device))
        scales = made.scale.view(torch.float32 if made.format == "int8" else torch.float16)
        scales.uniform_(0.5, 1.5, generator=generator).mul_(std / INTEGERS_STD[made.format])
        low, high = (-127, 128) if made.format == "int8" else (-(2**15), 2**15)  # four integers of four bits each
        made.q.random_(low, high, generator=generator)
        return made

    layers = tuple(
        LayerWeights(**{field: random(*packed_shape(stored)) for field, stored in layer_shapes(config, index).items()})
        for index in range(len(config.layers))
    )
    embedding = random(config.vocab, config.hidden, scale=0.1)
    weights = ModelWeights(embedding, layers, random(config.hidden), embedding)
    plan = memory_plan.plan(config, limits, integer_bytes(config, quantize) if quantize else {})
    return Model(config, limits, weights, RopeTables(config, limits), None, name, plan)

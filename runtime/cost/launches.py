"""Every kernel launch of a decode step, of one that checks guesses, or of a prompt's chunk, derived for any model and
GPU from sizes alone."""

from __future__ import annotations

from typing import Any

import torch

from runtime.engine.decode import decode_step
from runtime.engine.guess_step import GuessStep
from runtime.engine.padded_chunk import run_padded_chunk
from runtime.families.state import new_state
from runtime.kernels.attention_splits import SplitPlan, plan_splits
from runtime.kernels.launch import Gpu, Launch
from runtime.kernels.ops import RecordingOps
from runtime.kernels.scaled_matrix import ScaledMatrix, empty_matrix
from runtime.model import memory_plan
from runtime.model.config import ModelConfig, RuntimeConfig
from runtime.model.model import Model
from runtime.model.rope import RopeTables
from runtime.model.weights import LayerWeights, ModelWeights, layer_shapes, packed_shape, stored_shapes


def step_launches(
    config: ModelConfig,
    dtype: str,
    gpu: Gpu,
    *,
    batch: int = 1,
    rows: int | None = None,
    max_seq_len: int = 4096,
    samples: bool = False,
    masks: bool = False,
    quantize: str | None = None,
) -> list[Launch]:
    """Records the launches of one decode step, in order. Neither a GPU nor memory for the model is needed: the
    ordinary step runs on tensors that have shapes and no data.

    Args:
        config: the model.
        dtype: "float32", "bfloat16" or "float16".
        gpu: the GPU that the launches are for.
        batch: the most rows that the model has, 1 to 64.
        rows: of the step, 1 to `batch`, which is the default.
        max_seq_len: positions of the cache.
        samples, masks: whether tokens are drawn in rows that have a temperature, and whether rows have masks.
        quantize: "int8" for matrices of integers with scales; "int4", with embedding and head in int8; None for weights
            of `dtype`.

    Raises:
        ValueError: batch or max_seq_len is out of range.
    """
    limits = RuntimeConfig("meta", dtype, max_seq_len, batch, quantize=quantize)
    model, ops = model_without_data(config, limits), RecordingOps(gpu, batch)
    decode_step(ops, model, new_state(model, batch).first_rows(rows or batch), samples, masks)
    return ops.launches


def chunk_launches(
    config: ModelConfig,
    dtype: str,
    gpu: Gpu,
    seq: int,
    *,
    batch: int = 1,
    max_seq_len: int = 4096,
    quantize: str | None = None,
) -> list[Launch]:
    """Records the launches of a chunk of a prompt that is padded to `seq` tokens, the head's included; the matrix
    products between them are a library's. Otherwise as `step_launches`."""
    limits = RuntimeConfig("meta", dtype, max_seq_len, batch, prefill_chunk=seq, quantize=quantize)
    model, ops = model_without_data(config, limits), RecordingOps(gpu, batch)
    run_padded_chunk(ops, model, new_state(model, 1), seq, None)
    return ops.launches


def guess_launches(
    config: ModelConfig, dtype: str, gpu: Gpu, *, rows: int, batch: int = 8, max_seq_len: int = 4096
) -> list[Launch]:
    """Records the launches of one step that checks guesses.

    Args:
        config, dtype, gpu, batch, max_seq_len: as in `step_launches`; batch is at least 2.
        rows: 2 to `batch`.

    Raises:
        ValueError: batch or max_seq_len is out of range.
    """
    model, ops = model_without_data(config, RuntimeConfig("meta", dtype, max_seq_len, batch)), RecordingOps(gpu, batch)
    GuessStep(model, new_state(model, batch), rows).take(ops, model, rows)
    return ops.launches


def splits_at(launch: Launch, context: int) -> tuple[int, int, int]:
    """How a launch of attention, or of its combine kernel, splits a row of `context` tokens, the one being decoded
    included: its older keys, keys of one split, number of splits."""
    given = launch.arguments
    plan = SplitPlan(*(given[name] for name in ("FEW_SPLITS", "SPLIT_KEYS", "MOST_SPLITS")))
    return plan_splits(context - 1, given["window"], given["BLOCK_KEYS"], plan)


def model_without_data(config: ModelConfig, limits: RuntimeConfig) -> Model:
    """A model whose tensors have shapes and no data: its device is "meta"."""
    weights = _weights(config, getattr(torch, limits.dtype), limits.quantize)
    sizes = integer_bytes(config, limits.quantize) if limits.quantize else {}
    plan = memory_plan.plan(config, limits, sizes)
    return Model(config, limits, weights, RopeTables(config, limits), None, "", plan)


def integer_bytes(config: ModelConfig, quantize: str) -> dict[str, int]:
    """The bytes of each matrix of integers with scales, by stored name; `quantize` is as in `step_launches`."""
    return {
        name: _integers(*shape, config, quantize).nbytes
        for name, shape in stored_shapes(config).items()
        if len(shape) == 2
    }


def _integers(outputs: int, columns: int, config: ModelConfig, quantize: str) -> ScaledMatrix:
    form = "int8" if outputs == config.vocab else quantize  # the embedding and the head
    return empty_matrix(outputs, columns, form, torch.device("meta"))


def _weights(config: ModelConfig, dtype: torch.dtype, quantize: str | None) -> ModelWeights:
    """Weights without data."""

    def packed(*shape: int) -> Any:
        if quantize is None or len(shape) == 1:
            return torch.empty(shape, dtype=dtype, device="meta")
        outputs, columns = shape
        return _integers(outputs, columns, config, quantize)

    layers = tuple(
        LayerWeights(**{field: packed(*packed_shape(stored)) for field, stored in layer_shapes(config, index).items()})
        for index in range(len(config.layers))
    )
    embedding = packed(config.vocab, config.hidden)
    head = embedding if config.tied else packed(config.vocab, config.hidden)
    return ModelWeights(embedding, layers, packed(config.hidden), head)

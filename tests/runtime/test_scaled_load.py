"""Models of integers with scales, as a GPU has them: read from the cache's blocks to the bit, in the planned bytes, and
run in plain PyTorch with Hugging Face's tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.api import load
from runtime.bench.small_models import save_small_model
from runtime.checkpoint import scaled
from runtime.checkpoint.cache import CACHE_ENV
from runtime.errors import InvalidArgument
from runtime.kernels.quantized import QuantizedMatrix
from runtime.kernels.scaled_matrix import ScaledMatrix
from runtime.loading import resolve
from runtime.model.config import ModelConfig, RuntimeConfig
from runtime.model.memory_plan import ITEM_BYTES, plan
from runtime.model.published import PUBLISHED

pytestmark = pytest.mark.newest_only  # about code of our own

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("checkpoint.scaled", "checkpoint.weights", "loading"):
        monkeypatch.setattr(f"runtime.{module}.is_scaled", lambda device: True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_every_matrix_has_the_values_and_bytes_of_its_blocks(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Over several slices, the last of them shorter, and with a head of its own."""
    monkeypatch.setattr(scaled, "SLICE_WEIGHTS", 50 * 128)
    save_small_model("gemma2", tmp_path / "model", tie_word_embeddings=False, **SIZES)
    options: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "quantize": to, "progress": False}
    blocks = load(tmp_path / "model", **options).weights
    request.getfixturevalue("as_on_a_gpu")
    model = load(tmp_path / "model", **options)
    found = model.weights
    assert isinstance(found.head, ScaledMatrix) and found.head is not found.embedding
    pairs = [(found.embedding, blocks.embedding), (found.head, blocks.head)]
    pairs += [
        (getattr(mine, name), getattr(theirs, name))
        for mine, theirs in zip(found.layers, blocks.layers, strict=True)
        for name in ("qkv", "output", "gate_up", "down")
    ]
    for mine, theirs in pairs:
        assert isinstance(mine, ScaledMatrix) and isinstance(theirs, QuantizedMatrix)
        assert torch.equal(mine.dequantized(), theirs.dequantized())
        assert mine.nbytes == theirs.nbytes and mine.q.data_ptr() % 16 == mine.scale.data_ptr() % 16 == 0
    assert found.formats == {"int8": "int8", "int4": "int8 + int4"}[to] and f"blocks: {found.formats}," in repr(model)
    assert model.plan.weights == found.nbytes == blocks.nbytes
    assert model.plan.weights_read == found.nbytes - found.embedding.nbytes
    assert model.plan.embedding_row_bytes == 128 + 4


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("family", "to"), [("gemma", "int4"), ("gemma2", "int8"), ("gemma3", "int4")])
def test_tokens_of_the_plain_form_are_hugging_faces(family: str, to: str, quantized_pair: Any, random_ids: Any) -> None:
    pair, ids = quantized_pair(family, to), random_ids(12)
    assert isinstance(pair.ours.weights.embedding, ScaledMatrix)
    expected, _ = pair.hf_greedy(ids, 24)
    assert len(set(expected)) >= 8
    assert pair.greedy(ids, 24)[0] == expected


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_width_that_has_no_kernel_of_int4_is_refused_by_name(tmp_path: Path) -> None:
    save_small_model("gemma", tmp_path / "model", **SIZES | {"intermediate_size": 192})
    options: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "progress": False}
    with pytest.raises(InvalidArgument) as refused:
        resolve(tmp_path / "model", quantize="int4", **options)
    assert str(refused.value) == (
        "model.layers.0.mlp.down_proj.weight: expected rows of int8 or, for int4 on a GPU, a multiple of 128 columns, "
        'got Q4_0 with 192 (quantize="int8" takes any)'
    )
    assert resolve(tmp_path / "model", quantize="int8", **options).runtime.quantize == "int8"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpus_plan_has_room_for_the_values_of_a_matrix(dtype: str) -> None:
    config = ModelConfig.from_hf(PUBLISHED["gemma-1.1-2b"])
    limits = RuntimeConfig("cuda", dtype, quantize="int4")
    more = plan(config, limits).scratch - plan(config, dataclasses.replace(limits, quantize=None)).scratch
    assert more == 2 * config.intermediate * config.hidden * ITEM_BYTES[dtype]

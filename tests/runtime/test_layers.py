"""Layers of different shapes: what follows from a layer's sizes follows from its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from runtime.cost.launches import step_launches
from runtime.engine.decode import stepper, tokens
from runtime.engine.prefill import Prefill, prefill
from runtime.errors import CheckpointError
from runtime.families.kv_cache import KVCache
from runtime.families.state import new_state
from runtime.kernels.launch import Gpu
from runtime.model import memory_plan
from runtime.model.config import ModelConfig, RuntimeConfig
from runtime.model.layer_config import LayerConfig
from runtime.model.model import Model
from runtime.model.rope import RopeTables
from runtime.model.rope_config import RopeConfig
from runtime.model.weights import LayerWeights, ModelWeights, layer_shapes, packed_shape, stored_shapes
from runtime.parity.oracle import Oracle

SLIDING = LayerConfig(window=6, rope=RopeConfig(1e4), heads=4, kv_heads=2, head_dim=8)
FULL = LayerConfig(window=None, rope=RopeConfig(1e6), heads=3, kv_heads=1, head_dim=16)
H100 = Gpu("NVIDIA H100 80GB HBM3", 90, 132)
HIDDEN, MLP, VOCAB, LONGEST = 20, 24, 50, 32


@pytest.fixture(scope="module", params=["sliding first", "full first"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    layers = (SLIDING, FULL) if request.param == "sliding first" else (FULL, SLIDING)
    fields = {"model_type": "gemma3_text", "hidden_size": HIDDEN, "intermediate_size": MLP, "vocab_size": VOCAB}
    return replace(ModelConfig.from_hf(fields), layers=layers)


def test_each_layers_cache_has_its_own_shape(config: ModelConfig) -> None:
    cache = KVCache.allocate(config, 3, LONGEST, torch.float32, torch.device("cpu"))
    shapes = {None: (3, 1, LONGEST, 16), 6: (3, 2, 6, 8)}
    expected = [shapes[layer.window] for layer in config.layers]
    assert [tuple(keys.shape) for keys in cache.keys] == [tuple(values.shape) for values in cache.values] == expected


def test_the_plan_adds_up_each_layers_bytes(config: ModelConfig) -> None:
    plan = memory_plan.plan(config, RuntimeConfig("cpu", "bfloat16", LONGEST, 3))
    cache = KVCache.allocate(config, 3, LONGEST, torch.bfloat16, torch.device("cpu"))
    assert plan.kv_cache == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    sliding, full = 2 * 2 * 8 * 2, 2 * 1 * 16 * 2  # key and value of one position, in bytes
    assert plan.bytes_per_token(20) == plan.weights + 6 * sliding + 20 * full
    assert plan.weights == 2 * sum(torch.Size(shape).numel() for shape in stored_shapes(config).values())


def test_each_layers_weights_have_its_own_shape(config: ModelConfig) -> None:
    stored = stored_shapes(config)
    for index, layer in enumerate(config.layers):
        q, kv = (48, 16) if layer is FULL else (32, 16)
        name = f"model.layers.{index}.self_attn"
        assert stored[f"{name}.q_proj.weight"] == (q, HIDDEN) and stored[f"{name}.o_proj.weight"] == (HIDDEN, q)
        assert stored[f"{name}.k_proj.weight"] == stored[f"{name}.v_proj.weight"] == (kv, HIDDEN)
        assert stored[f"{name}.q_norm.weight"] == stored[f"{name}.k_norm.weight"] == (layer.head_dim,)
        assert packed_shape(layer_shapes(config, index)["qkv"]) == (sum(layer.qkv_widths), HIDDEN)


def test_each_layers_rotary_table_has_its_own_width(config: ModelConfig) -> None:
    tables = RopeTables(replace(config, layers=config.layers * 2), RuntimeConfig("cpu", "float32", LONGEST))
    for index, layer in enumerate(config.layers):
        cos, sin = tables.for_layer(index)
        assert cos.shape == sin.shape == (LONGEST, layer.head_dim // 2)
        assert tables.for_layer(index + 2)[0] is cos, "layers that share a table"


@pytest.fixture
def make_model(config: ModelConfig) -> Callable[..., Model]:
    """A model of these layers with random weights."""
    torch.manual_seed(0)
    layers = tuple(
        LayerWeights(**{name: torch.randn(packed_shape(rows)) for name, rows in layer_shapes(config, index).items()})
        for index in range(len(config.layers))
    )
    embedding = torch.randn(VOCAB, HIDDEN)
    weights = ModelWeights(embedding, layers, torch.randn(HIDDEN), embedding)

    def make(**options: Any) -> Model:
        limits = RuntimeConfig("cpu", "float32", LONGEST, **options)
        plan = memory_plan.plan(config, limits)
        return Model(config, limits, weights, RopeTables(config, limits), None, "layers of two shapes", plan)

    return make


@pytest.mark.parametrize("in_buckets", [False, True], ids=["unpadded", "in buckets"])
def test_prefill_takes_each_layers_shape(make_model: Callable[..., Model], in_buckets: bool) -> None:
    model, ids = make_model(prefill_chunk=5, eager=True), torch.randint(VOCAB, (13,)).tolist()
    state = new_state(model, 1, with_logits=True)
    prompt = Prefill(model, state, 0, ids, in_buckets=in_buckets)
    while not prompt.is_done:
        prompt.advance()
    assert state.logits is not None
    truth = Oracle(model.config, model.weights).logits(ids, 1)
    torch.testing.assert_close(state.logits.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
def test_a_step_takes_each_layers_shape(make_model: Callable[..., Model], eager: bool) -> None:
    """Of three rows, so that a narrower layer's rows lie closer together, past the window."""
    model = make_model(max_batch=3, eager=eager)
    state, prompts = new_state(model, 3, with_logits=True), torch.randint(VOCAB, (3, 9)).tolist()
    for row, ids in enumerate(prompts):
        ids.append(int(prefill(model, state, row, ids)))
    for picked in tokens(stepper(model, state), state, 4):
        assert state.logits is not None
        truth = torch.cat([Oracle(model.config, model.weights).logits(ids, 1) for ids in prompts])
        torch.testing.assert_close(state.logits.double(), truth, rtol=1e-4, atol=1e-4)
        for ids, token in zip(prompts, picked, strict=True):
            ids.append(token)


def test_the_cost_sheet_counts_each_layers_bytes(config: ModelConfig) -> None:
    launches = step_launches(config, "bfloat16", H100, batch=2, max_seq_len=LONGEST)
    projections = [launch for launch in launches if launch.kernel.__name__ == "qkv_projection_dot_kernel"]
    outputs = [launch.arguments["OUTPUTS"] for launch in projections]
    assert outputs == [sum(layer.qkv_widths) for layer in config.layers]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kv_heads": 3}, "heads must be a multiple of the 3 .* got 4"),
        ({"head_dim": 7}, "head_dim must be even .* got 7"),
        ({"heads": 0}, "heads must be an integer .* got 0"),
        ({"window": 0}, "window must be an integer .* got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        replace(SLIDING, **change)


@pytest.mark.parametrize("layers", [(), (None,)], ids=["none", "no LayerConfig"])
def test_a_model_has_layers(config: ModelConfig, layers: Any) -> None:
    with pytest.raises(CheckpointError, match="layers must be at least one LayerConfig"):
        replace(config, layers=layers)

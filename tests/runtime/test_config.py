"""The architecture read from config.json, compared with what transformers makes of the same fields."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import Gemma2Config, Gemma3Config, Gemma3TextConfig, GemmaConfig

from runtime.errors import CheckpointError
from runtime.model.config import ModelConfig, RuntimeConfig
from runtime.model.rope_config import RopeConfig

CLASSES = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig, "gemma3": Gemma3Config}

# The fields that decide the architecture in published checkpoints, in the layouts they were published with.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2b": {
        "model_type": "gemma",
        "hidden_act": "gelu",
        "hidden_activation": None,
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 256000,
    },
    "gemma-2-27b": {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 128,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "torch_dtype": "float32",
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "vocab_size": 262144,
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "all defaults, gemma": {"model_type": "gemma"},
    "all defaults, gemma2": {"model_type": "gemma2"},
    "all defaults, gemma3": {"model_type": "gemma3_text"},
    "pattern of 4": {"model_type": "gemma3_text", "sliding_window_pattern": 4},
    "listed layers": {
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "linear, gemma": {"model_type": "gemma", "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    "nested rope": {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    },
}


def rope_of(parameters: dict[str, Any]) -> RopeConfig:
    return RopeConfig(parameters["rope_theta"], parameters["rope_type"], parameters.get("factor", 1.0))


@pytest.mark.parametrize("layout", ["as published", "as transformers saves it"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_reads_what_transformers_reads(name: str, layout: str) -> None:
    fields = json.loads(json.dumps(PUBLISHED[name]))
    whole = CLASSES[fields["model_type"]].from_dict(json.loads(json.dumps(fields)))
    hf = whole.get_text_config()
    config = ModelConfig.from_hf(fields if layout == "as published" else json.loads(whole.to_json_string()))

    kinds = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    assert config.family == hf.model_type.removesuffix("_text")
    assert (config.vocab, config.hidden, config.intermediate) == (hf.vocab_size, hf.hidden_size, hf.intermediate_size)
    assert len(config.layers) == hf.num_hidden_layers
    assert {(layer.heads, layer.kv_heads, layer.head_dim) for layer in config.layers} == {
        (hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim)
    }
    assert config.attention_scale == getattr(hf, "query_pre_attn_scalar", hf.head_dim) ** -0.5
    windows = [hf.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    assert [layer.window for layer in config.layers] == windows
    nested = config.family == "gemma3"
    ropes = [rope_of(hf.rope_parameters[kind] if nested else hf.rope_parameters) for kind in kinds]
    assert [layer.rope for layer in config.layers] == ropes
    assert config.attention_softcap == getattr(hf, "attn_logit_softcapping", None)
    assert config.final_softcap == getattr(hf, "final_logit_softcapping", None)
    assert config.max_position_embeddings == hf.max_position_embeddings
    assert (config.rms_norm_eps, config.bos_token_id, config.pad_token_id) == (hf.rms_norm_eps, 2, 0)
    expected_dtype = PUBLISHED[name].get("torch_dtype")
    assert config.stored_dtype == expected_dtype


@pytest.mark.parametrize(
    ("generation", "config_stop", "expected"),
    [
        ({"eos_token_id": 1}, 5, (1,)),
        ({"eos_token_id": [1, 107]}, 5, (1, 107)),
        ({"eos_token_id": None}, 5, ()),
        ({}, 5, ()),
        (None, [1, 106], (1, 106)),
        (None, None, ()),
    ],
    ids=["int", "list", "null", "absent", "no file", "no file, null"],
)
def test_stop_tokens(generation: Any, config_stop: Any, expected: tuple[int, ...]) -> None:
    config = {"model_type": "gemma", "eos_token_id": config_stop}
    assert ModelConfig.from_hf(config, generation).stop_token_ids == expected


def test_a_softcap_that_transformers_does_not_apply_is_none() -> None:
    text = {"model_type": "gemma3_text", "final_logit_softcapping": 30.0}
    assert ModelConfig.from_hf(text).final_softcap == 30.0
    assert ModelConfig.from_hf({"model_type": "gemma3", "text_config": text}).final_softcap is None
    assert ModelConfig.from_hf({"model_type": "gemma", "final_logit_softcapping": 30.0}).final_softcap is None


def test_pads_with_a_stop_token_where_no_pad_is_defined() -> None:
    fields = {"model_type": "gemma", "pad_token_id": None, "eos_token_id": [7, 8]}
    assert ModelConfig.from_hf(fields).pad_token_id == 7


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({}, "None"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"model_type": "gemma", "hidden_act": "relu"}, "relu"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "gelu"),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"model_type": "gemma", "rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"model_type": "gemma", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e6}}, "nested"),
        ({"model_type": "gemma2", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "not nested"),
        ({"model_type": "gemma", "attention_bias": True}, "attention_bias"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "gemma", "tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"model_type": "gemma", "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"model_type": "gemma", "quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"model_type": "gemma", "torch_dtype": "float64"}, "float64"),
        (
            {"model_type": "gemma", "num_attention_heads": 6, "num_key_value_heads": 4},
            "heads must be a multiple of the 4 .* got 6",
        ),
        ({"model_type": "gemma", "head_dim": 7}, "head_dim"),
        ({"model_type": "gemma", "hidden_size": 0}, "hidden"),
        ({"model_type": "gemma", "hidden_size": "2048"}, "2048"),
        ({"model_type": "gemma", "num_hidden_layers": None}, "num_hidden_layers"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "26"),
        ({"model_type": "gemma2", "num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "chunked"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1.0}, "softcap"),
        ({"model_type": "gemma", "vocab_size": 10, "pad_token_id": 10}, "pad_token_id"),
        ({"model_type": "gemma", "eos_token_id": "1"}, "eos_token_id"),
        ({"model_type": "gemma", "rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_hf(fields)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"device": "tpu"}, ValueError),
        ({"device": "cuda:x"}, ValueError),
        ({"dtype": "int8"}, ValueError),
        ({"max_seq_len": 0}, ValueError),
        ({"max_seq_len": 1.5}, TypeError),
        ({"max_seq_len": True}, TypeError),
        ({"max_batch": 0}, ValueError),
        ({"max_batch": 65}, ValueError),
        ({"max_batch": 65, "device": "cuda:1"}, ValueError),
        ({"max_batch": "auto"}, TypeError),
        ({"prefill_chunk": -1}, ValueError),
    ],
    ids=str,
)
def test_runtime_config_refuses(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        RuntimeConfig(**{"device": "cpu", "dtype": "float32", **changes})

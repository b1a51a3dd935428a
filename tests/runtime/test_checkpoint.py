"""Loading is exact where a checkpoint is whole, and refuses by name where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoint import stored_tensor
from runtime.checkpoint.safetensors_folder import Checkpoint
from runtime.checkpoint.weights import find_stored, is_tied, read_weights
from runtime.errors import CheckpointError, ModelNotFound
from runtime.loading import read_config
from runtime.model.weights import ModelWeights

Make = Callable[..., tuple[Any, Path]]
EMBEDDING = "model.embed_tokens.weight"


def read(folder: Path, dtype: torch.dtype = torch.float32) -> ModelWeights:
    config = read_config(folder)
    stored = find_stored(Checkpoint(folder), config)
    return read_weights(stored, replace(config, tied=is_tied(stored, dtype)), torch.device("cpu"), dtype)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a single-file checkpoint after a change of its tensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_equals_hf(weights: ModelWeights, hf: Any, dtype: torch.dtype = torch.float32) -> None:
    """Every packed tensor holds the values of Hugging Face's modules, converted once."""
    decoder = hf.get_decoder() if hasattr(hf, "get_decoder") else hf
    family = hf.config.get_text_config().model_type.removesuffix("_text")

    def same(mine: torch.Tensor, *parts: torch.nn.Module) -> None:
        assert mine.is_contiguous()
        assert torch.equal(mine, torch.cat([part.weight for part in parts]).to(dtype))

    same(weights.embedding, decoder.embed_tokens)
    same(weights.final_norm, decoder.norm)
    for mine, theirs in zip(weights.layers, decoder.layers, strict=True):
        attention, mlp = theirs.self_attn, theirs.mlp
        same(mine.qkv, attention.q_proj, attention.k_proj, attention.v_proj)
        same(mine.output, attention.o_proj)
        same(mine.gate_up, mlp.gate_proj, mlp.up_proj)
        same(mine.down, mlp.down_proj)
        same(mine.attention_norm, theirs.input_layernorm)
        if family == "gemma":
            same(mine.mlp_norm, theirs.post_attention_layernorm)
            assert mine.post_attention_norm is None and mine.post_mlp_norm is None
        else:
            same(mine.post_attention_norm, theirs.post_attention_layernorm)
            same(mine.mlp_norm, theirs.pre_feedforward_layernorm)
            same(mine.post_mlp_norm, theirs.post_feedforward_layernorm)
        if family == "gemma3":
            same(mine.q_norm, attention.q_norm)
            same(mine.k_norm, attention.k_norm)
        else:
            assert mine.q_norm is None and mine.k_norm is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=lambda dtype: f"stored {dtype}")
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_weights_equal_hugging_faces(
    checkpoint: Make, family: str, stored: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tensor, "SLICE_BYTES", 300)  # several slices a tensor, the last one short
    hf, folder = checkpoint(family, stored)
    assert_equals_hf(read(folder, dtype), hf, dtype)


def test_reads_shards(checkpoint: Make) -> None:
    hf, folder = checkpoint(shard="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_equals_hf(read(folder), hf)


def test_reads_a_bare_decoder(checkpoint: Make, tmp_path: Path) -> None:
    hf, _ = checkpoint("gemma2")
    hf.model.save_pretrained(tmp_path / "bare")
    assert EMBEDDING.removeprefix("model.") in load_file(tmp_path / "bare" / "model.safetensors")
    assert_equals_hf(read(tmp_path / "bare"), hf)


@pytest.mark.parametrize(
    ("text", "vision"),
    [("language_model.model.", ""), ("model.language_model.", "model.")],
    ids=["before transformers 4.52", "since"],
)
def test_reads_the_text_part_of_a_multimodal_checkpoint(checkpoint: Make, text: str, vision: str) -> None:
    hf, folder = checkpoint("gemma3")

    def to_multimodal(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[text + name.removeprefix("model.")] = tensors.pop(name)
        tensors[f"{vision}vision_tower.vision_model.post_layernorm.weight"] = torch.ones(3)
        tensors[f"{vision}multi_modal_projector.mm_input_projection_weight"] = torch.ones(3, 4)

    edit(folder, to_multimodal)
    text_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text_config}))
    assert_equals_hf(read(folder), hf)

    edit(folder, lambda tensors: tensors.update(audio_tower=torch.ones(3)))
    with pytest.raises(CheckpointError, match="audio_tower"):
        read(folder)


def test_a_text_checkpoint_has_no_vision_part(checkpoint: Make) -> None:
    _, folder = checkpoint()
    edit(folder, lambda tensors: tensors.update({"vision_tower.x": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"vision_tower\.x"):
        read(folder)


Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.2.post_feedforward_layernorm.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda tensors: tensors.pop(Q), f"{Q} is missing"),
    "missing embedding": (lambda tensors: tensors.pop(EMBEDDING), f"{EMBEDDING} is missing"),
    "missing two": (lambda tensors: (tensors.pop(Q), tensors.pop(NORM)), r"\(and 1 more\) is missing"),
    "surplus": (lambda tensors: tensors.update(extra=torch.ones(2)), "extra is not part"),
    "surplus layer": (
        lambda tensors: tensors.update({Q.replace("1", "3"): tensors[Q].clone()}),
        r"layers\.3\.self_attn\.q_proj\.weight is not part",
    ),
    "misshapen": (lambda tensors: tensors.update({Q: tensors[Q][1:].clone()}), r"must have shape \[24, 20\].*23"),
    "transposed": (lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}), "must have shape"),
    "nan": (lambda tensors: tensors[Q][3, 4].fill_(float("nan")), f"{Q} holds a value that is not finite"),
    "two nans": (
        lambda tensors: [tensors[name].fill_(float("nan")) for name in (NORM, Q)],
        f"{Q} holds a value that is not finite",  # the first, whichever thread was first
    ),
    "infinity": (lambda tensors: tensors[NORM][-1:].fill_(-float("inf")), f"{NORM} holds a value"),
    "integers": (lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}), "stored as I8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_named(checkpoint: Make, damage: str) -> None:
    change, message = DAMAGE[damage]
    _, folder = checkpoint()
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_whoever_loads_may_be_in_any_mode(checkpoint: Make, mode: Callable[[], Any]) -> None:
    hf, folder = checkpoint()
    with mode():
        weights = read(folder, torch.bfloat16)
        assert (
            weights.embedding.is_inference() == (mode is torch.inference_mode) and not weights.embedding.requires_grad
        )
    assert_equals_hf(weights, hf, torch.bfloat16)


def test_every_stored_byte_is_counted(checkpoint: Make) -> None:
    _, folder = checkpoint()
    config, counts = read_config(folder), []
    stored = find_stored(Checkpoint(folder), config)
    read_weights(stored, config, torch.device("cpu"), torch.float32, counts.append)
    assert sum(counts) == sum(tensor.bytes for tensor in stored.values()) and len(counts) >= len(stored)


def test_overflow_in_the_asked_dtype_is_named(checkpoint: Make) -> None:
    _, folder = checkpoint()
    edit(folder, lambda tensors: tensors[Q][0, 0].fill_(1e6))
    read(folder, torch.bfloat16)
    with pytest.raises(CheckpointError, match=f"{Q} overflows torch.float16"):
        read(folder, torch.float16)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1], ids=lambda keep: f"{keep} bytes")
def test_truncated_files_are_refused(checkpoint: Make, keep: int) -> None:
    _, folder = checkpoint()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\n" * 3,
        (9).to_bytes(8, "little") + b'{"a": {}}',
        bytes(64),
        (64).to_bytes(8, "little") + b'{"a\\nb": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    ],
    ids=["git-lfs pointer", "malformed header", "zeros", "name of two lines"],
)
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="inconsistent at tensor b"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin", 3], ids=str)
def test_an_index_stays_in_its_folder(tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):  # what a careless reader would find
        save_file({"a": torch.ones(2)}, place / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="the index names"):
        Checkpoint(folder)


def test_index_and_shards_must_agree(checkpoint: Make) -> None:
    _, folder = checkpoint(shard="10KB")
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    whole = json.loads(index.read_text())
    name, other = next((n, s.name) for n, f in whole["weight_map"].items() for s in shards if s.name != f)

    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], name: other}}))
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "ghost": other}}))
    with pytest.raises(CheckpointError, match="ghost is missing from"):
        Checkpoint(folder)
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint(folder)
    index.write_text("[")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint(folder)
    index.write_text(json.dumps(whole))
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=shards[0].name):
        Checkpoint(folder)


FOREIGN = {
    "nothing": ([], "it is empty"),
    "text": (["README.md", "config.json"], r"no weights, but README\.md, config\.json"),
    "pickle": (["pytorch_model.bin"], r"pickle weights.*\(pytorch_model\.bin\)"),
    "adapter": (["adapter_config.json", "adapter_model.safetensors", "README.md"], "adapter.*merge it into its base"),
    "gguf": (["model-Q4_K_M.gguf", "model-Q8_0.GGUF"], r"GGUF: give the path.*Q4_K_M\.gguf, model-Q8_0\.GGUF"),
    "shards": (["model-00001-of-00002.safetensors"], "shards of a checkpoint, but no index"),
    "variant": (
        ["model.fp16.safetensors", "optimizer.bin"],
        r"not under a checkpoint's names.*model\.fp16\.safetensors",
    ),
    "keras": (["model.weights.h5"], "Keras"),
    "flax": (["flax_model.msgpack"], "Flax"),
    "orbax": (["_METADATA", "manifest.ocdbt"], "Orbax"),
    "onnx": (["model.onnx"], "ONNX"),
    "original": (["original/consolidated.00.pth", "original/params.json"], r"consolidated.*\(original/consolidated"),
    "nested": (["gemma/config.json", "gemma/model.safetensors"], "found gemma below it.*load that folder"),
    "many": ([f"part{i}.bin" for i in range(9)], r"part2\.bin and 6 more"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_holds_something_else_is_described(tmp_path: Path, kind: str) -> None:
    names, message = FOREIGN[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ModelNotFound, match=rf"^no model\.safetensors or .*{message}") as caught:
        Checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    if "config.json" not in names:
        with pytest.raises(ModelNotFound, match=rf"^no config\.json in .*{message}"):
            read_config(tmp_path)


def test_peak_memory_is_the_weights_and_little_more(checkpoint: Make) -> None:
    """At most 1.3 times the weights plus 500 MB, on a single-file checkpoint of 400 MB."""
    _, folder = checkpoint("gemma", torch.bfloat16, vocab_size=100_000, hidden_size=1000, intermediate_size=12_000)
    script = """
import re, sys
from pathlib import Path
import torch
from runtime.checkpoint.safetensors_folder import Checkpoint
from runtime.loading import read_config
from runtime.checkpoint.weights import find_stored, read_weights
folder = Path(sys.argv[1])
config = read_config(folder)
weights = read_weights(find_stored(Checkpoint(folder), config), config, torch.device("cpu"), torch.bfloat16)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(int(peak[1]) * 1024, (folder / "model.safetensors").stat().st_size)
"""
    ran = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    peak, weights = map(int, ran.stdout.split())
    assert weights > 400e6
    assert peak <= 1.3 * weights + 500e6

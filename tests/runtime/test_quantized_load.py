"""Checkpoints quantised to int8 or int4 at load: values right to the bit, bytes counted, the cache strict, misuse
refused."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.api import Model, load
from runtime.bench.small_models import save_small_model
from runtime.checkpoint import quantized, safetensors_file
from runtime.checkpoint.cache import CACHE_ENV
from runtime.cli.main import main
from runtime.cost import info
from runtime.errors import CacheError, CheckpointError, InvalidArgument
from runtime.hugging_face.shared_weights import named_weights
from runtime.kernels.quantized import QuantizedMatrix
from runtime.loading import resolve

from .gguf_files import write_gguf

pytestmark = pytest.mark.newest_only  # about code of our own

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 2}
LAYERS = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"]}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes (once) a small model whose matrices kernels take in blocks."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str = "gemma3", **overrides: Any) -> Path:
        key = (family, *sorted(overrides.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            save_small_model(family, made[key], **SIZES | LAYERS.get(family, {}) | overrides)
        return made[key]

    return make


@pytest.fixture
def folder(folder_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy to change."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder_of().iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def read(source: str | Path, to: str, **options: Any) -> Model:
    return load(source, **{"device": "cpu", "max_seq_len": 64, "quantize": to, "progress": False} | options)


def int8(values: np.ndarray) -> np.ndarray:
    """Each row to the nearest of 255 multiples of its largest magnitude / 127, of two the even one."""
    scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
    return scale * np.rint(values / scale).astype(np.float32)


def int4(values: np.ndarray) -> np.ndarray:
    gguf = pytest.importorskip("gguf", reason="needs the demo extra")
    return gguf.dequantize(gguf.quantize(values, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0)


def assert_holds(model: Model, stored: Mapping[str, torch.Tensor], to: str) -> None:
    """That a model has the stored weights: matrices quantised, norms as they are, all to the bit."""
    weights = {name: value for name, value in named_weights(model).items() if value is not None}
    assert {name for name in weights if name != HEAD} == stored.keys() - {HEAD}
    for name, value in stored.items():
        expected = value.float().numpy()
        if value.dim() == 2:
            expected = (int8 if to == "int8" or name in (EMBEDDING, HEAD) else int4)(expected)
        np.testing.assert_array_equal(weights[name].numpy(), expected, err_msg=name)


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_a_folders_weights(
    folder_of: Callable[..., Path], family: str, to: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(family)
    model = read(folder, to)
    assert_holds(model, load_file(folder / "model.safetensors"), to)
    assert model.dtype == torch.float32 and model.runtime.quantize == to
    assert model.weights.formats == {"int8": "INT8", "int4": "INT8 + Q4_0"}[to]
    assert model.weights.head is model.weights.embedding
    assert model.plan.weights == model.plan.weights_read == model.weights.nbytes
    # Once: the second time it comes from the cache.
    monkeypatch.setattr(quantized, "blocks_of", lambda *_: pytest.fail("quantised again"))
    assert_holds(pickle.loads(pickle.dumps(model)), load_file(folder / "model.safetensors"), to)
    (cached,) = own_cache.glob(f"{to}-*/")
    assert {path.name for path in cached.iterdir()} == {"model.safetensors", "manifest.json"}
    assert (cached / "model.safetensors").stat().st_size < model.weights.nbytes + 10_000


def test_bytes_are_those_of_the_formats(folder_of: Callable[..., Path]) -> None:
    stored = load_file(folder_of() / "model.safetensors")
    matrices = {name: value for name, value in stored.items() if value.dim() == 2}
    norms = 4 * sum(value.numel() for value in stored.values() if value.dim() == 1)
    rows = {name: len(value) * (value.shape[1] + 4) for name, value in matrices.items()}
    groups = {name: value.numel() // 32 * 18 for name, value in matrices.items()}
    for to, each in (("int8", rows), ("int4", groups | {EMBEDDING: rows[EMBEDDING]})):
        plan = resolve(folder_of(), device="cpu", max_seq_len=64, quantize=to, progress=False).plan
        assert plan.weights == norms + sum(each.values())


def test_a_head_of_its_own_is_int8(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored[HEAD] = stored[EMBEDDING] * 1.5 + 0.25
    save_file(stored, folder / "model.safetensors")
    model = read(folder, "int4")
    assert_holds(model, stored, "int4")
    assert isinstance(model.weights.head, QuantizedMatrix) and model.weights.head.formats == "INT8"
    assert not model.config.tied and model.plan.weights == model.weights.nbytes
    assert model.plan.weights_read == model.weights.nbytes - model.weights.embedding.nbytes
    assert model.plan.embedding_row_bytes == SIZES["hidden_size"] + 4


def test_weights_on_a_grid_of_q4_0_come_back(folder: Path) -> None:
    """As a QAT checkpoint has them: read in bf16, and the model's matrices round to the file's."""
    stored = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    for name, value in stored.items():
        if "_proj" in name:
            steps = torch.randint(-7, 8, (value.numel() // 32, 32), generator=generator)
            scale = (torch.rand(len(steps), 1, generator=generator) * 0.05 + 0.01).bfloat16()
            stored[name] = (scale.float() * steps).view(value.shape)
    save_file({name: value.bfloat16() for name, value in stored.items()}, folder / "model.safetensors")
    weights = named_weights(read(folder, "int4"))
    for name in [name for name in stored if "_proj" in name]:
        value = weights[name]
        assert value is not None and torch.equal(value.bfloat16(), stored[name].bfloat16()), name


def test_a_gguf_files_own_values_are_quantised(tmp_path: Path) -> None:
    """Not those of its conversion to bf16; a file in Q4_0 keeps its blocks."""
    values = write_gguf(tmp_path / "m.gguf", kind={"token_embd": "Q6_K"} | dict.fromkeys(_kinds(), "Q4_0"))
    model = read(tmp_path / "m.gguf", "int4")
    layer, embedding = model.weights.layers[1], values["token_embd.weight"]
    np.testing.assert_array_equal(model.weights.embedding.dequantized().numpy(), int8(embedding))  # type: ignore[operator]
    for matrix, names in ((layer.gate_up, ["ffn_gate", "ffn_up"]), (layer.qkv, ["attn_q", "attn_k", "attn_v"])):
        expected = np.concatenate([values[f"blk.1.{name}.weight"] for name in names])
        np.testing.assert_array_equal(matrix.dequantized().numpy(), expected)  # type: ignore[operator]
    np.testing.assert_array_equal(layer.mlp_norm.numpy(), values["blk.1.ffn_norm.weight"] - 1)


def _kinds() -> list[str]:
    from .gguf_files import shapes

    return [name for name, shape in shapes().items() if len(shape) == 2]


def test_widths_that_kernels_do_not_take_stay_values(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gemma_runtime")
    model = read(tiny_folder, "int8")
    assert isinstance(model.weights.embedding, torch.Tensor) and model.weights.formats == ""
    assert model.plan.weights == model.weights.nbytes
    (line,) = (record.getMessage() for record in caplog.records if "are kept" in record.getMessage())
    assert line.endswith("22 matrices are kept as values: their columns are not a multiple of 64")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", EMBEDDING, "model.norm.weight"])
def test_values_that_are_not_finite_are_refused(folder: Path, own_cache: Path, name: str, value: float) -> None:
    stored = load_file(folder / "model.safetensors")
    stored[name].view(-1)[-1] = value
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {name} holds a value that is not finite: .*model.safetensors"):
        read(folder, "int8")
    assert not list(own_cache.glob("int8-*/"))


def test_a_scale_beyond_fp16_is_refused(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.mlp.down_proj.weight"][3, 40] = 1e6
    save_file(stored, folder / "model.safetensors")
    read(folder, "int8")
    with pytest.raises(CheckpointError, match=r"down_proj.weight does not fit Q4_0: a group's scale must be at most"):
        read(folder, "int4")


@pytest.mark.parametrize("change", ["cut", "edited", "gone", "more"])
def test_a_cached_model_that_was_changed_is_made_anew(folder: Path, own_cache: Path, change: str) -> None:
    read(folder, "int4")
    (cached,) = own_cache.glob("int4-*/")
    file, content = cached / "model.safetensors", (cached / "model.safetensors").read_bytes()
    if change == "cut":
        file.write_bytes(content[:-10])
    elif change == "edited":
        file.write_bytes(content[:-10] + bytes(10))
    elif change == "gone":
        file.unlink()
    else:
        (cached / "other").write_bytes(b"")
    assert_holds(read(folder, "int4"), load_file(folder / "model.safetensors"), "int4")
    assert file.read_bytes() == content and {path.name for path in cached.iterdir()} == {file.name, "manifest.json"}


def test_other_weights_are_not_found_in_the_cache(folder: Path, own_cache: Path) -> None:
    read(folder, "int8")
    stored = load_file(folder / "model.safetensors")
    stored[EMBEDDING][5] *= 2
    save_file(stored, folder / "model.safetensors")
    assert_holds(read(folder, "int8"), stored, "int8")
    assert len(list(own_cache.glob("int8-*/"))) == 2


def test_what_other_code_quantised_is_not_found_in_the_cache(
    folder_of: Callable[..., Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(folder_of(), "int8")
    monkeypatch.setattr(quantized, "REVISION", quantized.REVISION + 1)
    read(folder_of(), "int8")
    assert len(list(own_cache.glob("int8-*/"))) == 2


def test_a_checkpoint_that_changes_while_it_is_quantised_is_refused(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of = quantized.blocks_of

    def changing(*arguments: Any) -> torch.Tensor:
        (folder / "model.safetensors").touch()
        return blocks_of(*arguments)

    monkeypatch.setattr(quantized, "blocks_of", changing)
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        read(folder, "int8")
    assert not list(own_cache.glob("int8-*/"))


def test_a_full_disk_and_a_cache_that_cannot_be_written_are_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(CacheError, match=r"MB of disk are needed, 0 MB are free"):
            read(folder, "int8")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "file"))
    with pytest.raises(CacheError, match=f"cannot write the model cache .*file: File exists .set {CACHE_ENV}"):
        read(folder, "int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype must be \"auto\" or \"float32\" with quantize='int8' on a CPU, got 'bfloat16'"),
        ({"interface": "hf"}, 'interface must be "runtime" with quantize=\'int8\', got "hf"'),
        ({"quantize": "INT8"}, "quantize must be None or one of ('gguf', 'int8', 'int4'), got 'INT8'"),
        ({"quantize": 8}, "quantize must be None or one of ('gguf', 'int8', 'int4'), got 8"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_the_source_is(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("runtime.checkpoint.sources.locate", lambda *_: pytest.fail("resolved the source"))
    with pytest.raises(InvalidArgument) as refused:
        load("demo", **{"device": "cpu", "quantize": "int8"} | options)
    assert str(refused.value).startswith(message)


def test_the_command_line(
    folder_of: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "read_bandwidth_gb_s", lambda _: 10.0)
    name = str(folder_of())
    assert main(["info", name, "--device", "cpu", "--quantize", "int4"]) == 0
    assert "float32, matrices in int4, embedding and head in int8\n" in capfd.readouterr().out
    for arguments, message in (
        (["info", "--quantize", "gguf", "--plan"], "--quantize gguf is for a CPU, --plan h100 for a GPU"),
        (["generate", "--model", name, "--quantize", "int4", "--dtype", "bf16", "A"], 'dtype must be "auto" or'),
        (["generate", "--quantize", "int3", "A"], "--quantize: invalid choice: 'int3' (choose from"),
    ):
        try:
            code: object = main(arguments)
        except SystemExit as ended:
            code = ended.code
        error = capfd.readouterr().err
        assert code == 2 and message in error and error.count("\n") == 1

"""GGUF files whose matrices stay in their blocks: values right to the bit, bytes counted, damage and misuse refused."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime import loading
from runtime.api import Model, load
from runtime.checkpoint.cache import CACHE_ENV
from runtime.checkpoint.gguf import in_place
from runtime.cli.main import main
from runtime.cost import info
from runtime.errors import CheckpointError, InvalidArgument
from runtime.hugging_face.shared_weights import named_weights
from runtime.kernels.cpu.block_formats import FORMATS
from runtime.kernels.quantized import QuantizedMatrix
from runtime.loading import ResolvedModel, resolve
from runtime.loading import read as read_model
from runtime.model.config import RuntimeConfig

from .gguf_files import HEAD_DIM, HEADS, HIDDEN, LAYERS, MLP, TOKENS, shapes, write_gguf

pytestmark = pytest.mark.newest_only  # about code of our own

gguf = pytest.importorskip("gguf", reason="needs the demo extra")

Q, KV = HEADS * HEAD_DIM, HEAD_DIM


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(path: Path, **options: Any) -> Model:
    return load(path, **{"device": "cpu", "max_seq_len": 64, "quantize": "gguf", "progress": False} | options)


def values_of(weight: torch.Tensor | QuantizedMatrix) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight.dequantized()


def assert_holds(model: Model, values: Mapping[str, np.ndarray]) -> None:
    """That every weight of a Gemma 3 has the file's values, bit for bit; the factor of a norm, less 1."""

    def expect(weight: torch.Tensor | QuantizedMatrix, *names: str) -> None:
        expected = np.concatenate([values[name] - (1 if name.endswith("_norm.weight") else 0) for name in names])
        given = values_of(weight)
        assert given.dtype == torch.float32 and given.shape == weight.shape
        assert np.array_equal(given.numpy().view(np.int32), expected.astype(np.float32).view(np.int32)), names

    weights = model.weights
    expect(weights.embedding, "token_embd.weight")
    expect(weights.final_norm, "output_norm.weight")
    expect(weights.head, "output.weight" if "output.weight" in values else "token_embd.weight")
    fields = {
        "attention_norm": ["attn_norm"],
        "qkv": ["attn_q", "attn_k", "attn_v"],
        "q_norm": ["attn_q_norm"],
        "k_norm": ["attn_k_norm"],
        "output": ["attn_output"],
        "post_attention_norm": ["post_attention_norm"],
        "mlp_norm": ["ffn_norm"],
        "gate_up": ["ffn_gate", "ffn_up"],
        "down": ["ffn_down"],
        "post_mlp_norm": ["post_ffw_norm"],
    }
    for index, layer in enumerate(weights.layers):
        assert fields.keys() == vars(layer).keys()
        for field, names in fields.items():
            expect(getattr(layer, field), *(f"blk.{index}.{name}.weight" for name in names))


def matrices(model: Model) -> list[torch.Tensor | QuantizedMatrix]:
    layers = [getattr(layer, name) for layer in model.weights.layers for name in ("qkv", "output", "gate_up", "down")]
    head = [] if model.weights.head is model.weights.embedding else [model.weights.head]
    return [model.weights.embedding, *head, *layers]


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_hold_the_files_values_in_the_files_bytes(
    tmp_path: Path, own_cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "SLICE_BYTES", 10_000)  # some rows at a time, and the last ones fewer
    values = write_gguf(tmp_path / "m.gguf", kind=kind)
    model = read(tmp_path / "m.gguf")
    assert_holds(model, values)
    form = FORMATS[kind]
    for matrix in matrices(model):
        assert isinstance(matrix, QuantizedMatrix) and len(matrix.parts) == 1
        assert matrix.nbytes == matrix.numel() // form.columns * form.bytes
        assert all(part.data.is_contiguous() and part.data.data_ptr() % 64 == 0 for part in matrix.parts)
    assert model.dtype == torch.float32 and model.runtime.quantize == "gguf"
    assert f"blocks: {kind}," in repr(model) and f", {kind}, cpu)" in repr(model.weights)
    assert model.weights.parameters == sum(value.size for value in values.values())
    assert model.plan.weights == model.plan.weights_read == model.weights.nbytes
    (folder,) = own_cache.glob("m-*/")
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("tensors.json", "manifest.json"),
    }


def rewrite(path: Path, kinds: Mapping[str, str], tensors: Mapping[str, tuple[int, ...]] = {}) -> dict[str, np.ndarray]:
    """Write a Gemma 3 whose tensors are of other types than Q8_0, by name or by the last part of the name."""
    chosen = {name: kinds.get(name, kinds.get(name.split(".")[-2], "Q8_0")) for name in shapes() | dict(tensors)}
    return write_gguf(path, kind=chosen, tensors=tensors)


def test_what_is_packed_may_be_in_several_formats(tmp_path: Path) -> None:
    kinds = {"attn_q": "Q5_0", "attn_k": "Q5_0", "attn_v": "Q6_K", "ffn_gate": "Q4_K", "token_embd": "Q4_0"}
    values = rewrite(tmp_path / "m.gguf", kinds)
    model = read(tmp_path / "m.gguf")
    assert_holds(model, values)
    layer = model.weights.layers[1]
    assert isinstance(layer.qkv, QuantizedMatrix) and isinstance(layer.gate_up, QuantizedMatrix)
    # Neighbours of one format are one part.
    assert [(part.format.name, len(part.data)) for part in layer.qkv.parts] == [("Q5_0", Q + KV), ("Q6_K", KV)]
    assert [(part.format.name, len(part.data)) for part in layer.gate_up.parts] == [("Q4_K", MLP), ("Q8_0", MLP)]
    assert model.weights.formats == "Q4_0 + Q5_0 + Q6_K + Q8_0 + Q4_K"
    assert model.plan.weights == model.weights.nbytes


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q2_K", "IQ4_NL", "MXFP4"])
def test_types_without_kernels_become_their_values(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gemma_runtime")
    values = rewrite(tmp_path / "m.gguf", {"attn_k": kind, "ffn_down": kind})
    model = read(tmp_path / "m.gguf")
    assert_holds(model, values)
    layer = model.weights.layers[0]
    assert isinstance(layer.qkv, torch.Tensor) and isinstance(layer.down, torch.Tensor)
    assert isinstance(layer.output, QuantizedMatrix) and isinstance(layer.gate_up, QuantizedMatrix)
    assert model.plan.weights == model.weights.nbytes
    (line,) = (record.getMessage() for record in caplog.records if "are kept" in record.getMessage())
    assert line.endswith(f"{4 * LAYERS} matrices are kept as values: stored as or packed with {kind}")


def test_columns_that_kernels_do_not_take_become_values(tmp_path: Path) -> None:
    sizes = {"feed_forward_length": 96}
    tensors = {
        f"blk.{layer}.{name}.weight": shape
        for layer in range(LAYERS)
        for name, shape in (("ffn_gate", (96, HIDDEN)), ("ffn_up", (96, HIDDEN)), ("ffn_down", (HIDDEN, 96)))
    }
    values = write_gguf(tmp_path / "m.gguf", sizes=sizes, tensors=tensors)
    model = read(tmp_path / "m.gguf")
    assert_holds(model, values)
    layer = model.weights.layers[0]
    assert isinstance(layer.gate_up, QuantizedMatrix) and isinstance(layer.down, torch.Tensor)
    assert model.plan.weights == model.weights.nbytes


@pytest.mark.parametrize("equal", [False, True], ids=["another head", "the same head"])
def test_a_head_of_its_own_is_read_and_counted(tmp_path: Path, equal: bool) -> None:
    head = {"output.weight": (len(TOKENS), HIDDEN)}
    values = rewrite(tmp_path / "m.gguf", {"token_embd": "Q8_0", "output": "Q8_0" if equal else "Q6_K"}, head)
    if equal:
        file = in_place.GgufFile(tmp_path / "m.gguf").tensors
        table, own = file["token_embd.weight"], file["output.weight"]
        content = bytearray((tmp_path / "m.gguf").read_bytes())
        content[own.offset : own.offset + own.bytes] = content[table.offset : table.offset + table.bytes]
        (tmp_path / "m.gguf").write_bytes(content)
        values["output.weight"] = values["token_embd.weight"]
    model = read(tmp_path / "m.gguf")
    assert_holds(model, values)
    assert model.config.tied == equal == (model.weights.head is model.weights.embedding)
    assert model.plan.weights == model.weights.nbytes
    read_each_step = model.weights.nbytes - (0 if equal else model.weights.embedding.nbytes)
    assert model.plan.weights_read == read_each_step
    assert model.plan.embedding_row_bytes == (0 if equal else HIDDEN // 32 * 34)
    cached = model.plan.kv_row_bytes
    assert model.plan.bytes_per_token(1) == read_each_step + model.plan.embedding_row_bytes + sum(cached)


def test_hugging_faces_model_gets_the_values(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "m.gguf", kind="Q4_K")
    named = named_weights(read(tmp_path / "m.gguf"))
    assert named["lm_head.weight"] is named["model.embed_tokens.weight"]
    for name, stored in (("self_attn.v_proj", "attn_v"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")):
        given = named[f"model.layers.1.{name}.weight"]
        assert given is not None and np.array_equal(given.numpy(), values[f"blk.1.{stored}.weight"])


def test_it_pickles_as_the_recipe_and_other_families_load(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "gemma2")
    model = read(tmp_path / "m.gguf")
    again = pickle.loads(pickle.dumps(model))
    assert again.runtime == model.runtime and again.config == model.config
    assert torch.equal(values_of(again.weights.embedding), values_of(model.weights.embedding))
    part = pickle.dumps(model.weights.layers[0].down)
    assert len(part) < model.weights.layers[0].down.nbytes + 2000


SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q6_K": (208,)}
SCALES |= dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))


@pytest.mark.parametrize(("kind", "at"), [(kind, at) for kind, places in SCALES.items() for at in places])
@pytest.mark.parametrize("scale", [np.nan, -np.inf], ids=["NaN", "infinity"])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, kind: str, at: int, scale: float) -> None:
    assert SCALES.keys() == FORMATS.keys()
    write_gguf(tmp_path / "m.gguf", kind=kind)
    tensor = in_place.GgufFile(tmp_path / "m.gguf").tensors["blk.1.ffn_up.weight"]
    place = tensor.offset + tensor.bytes - FORMATS[kind].stored_bytes + at  # in the last block
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[place : place + 2] = np.array(scale, np.float16).tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight holds a scale that is not finite: .*m\.gguf"):
        read(tmp_path / "m.gguf")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    tensor = in_place.GgufFile(tmp_path / "m.gguf").tensors["blk.1.ffn_norm.weight"]
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[tensor.offset : tensor.offset + 4] = np.array(np.nan, np.float32).tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_norm\.weight holds a value that is not finite: .*m\.gguf"):
        read(tmp_path / "m.gguf")


def resolved(path: Path) -> ResolvedModel:
    return resolve(path, device="cpu", max_seq_len=64, quantize="gguf", progress=False)


@pytest.mark.parametrize("change", ["replaced", "cut", "rewritten"])
def test_a_file_that_changes_after_its_header_is_refused(tmp_path: Path, change: str) -> None:
    write_gguf(tmp_path / "m.gguf")
    found = resolved(tmp_path / "m.gguf")
    if change == "replaced":
        write_gguf(tmp_path / "other.gguf", seed=1)
        (tmp_path / "other.gguf").replace(tmp_path / "m.gguf")
    else:
        with (tmp_path / "m.gguf").open("r+b") as file:
            file.truncate(20_000) if change == "cut" else file.write(b"GGUF")
    with pytest.raises(CheckpointError, match=r"m\.gguf has changed since its header was read"):
        read_model(found, Model, progress=False)


def test_a_file_that_changes_while_a_tensor_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    found = resolved(tmp_path / "m.gguf")

    def written(self: in_place.Blocks, stored: np.ndarray) -> None:
        with (tmp_path / "m.gguf").open("r+b") as file:
            file.write(b"GGUF")

    monkeypatch.setattr(in_place.Blocks, "_check_finite", written)
    blocks = found.stored["model.embed_tokens.weight"].blocks
    assert blocks is not None
    with pytest.raises(CheckpointError, match=r"m\.gguf has changed since its header was read"):
        blocks.copy_into(torch.empty(len(TOKENS), HIDDEN // 32 * 34, dtype=torch.uint8))


def test_a_truncated_file_and_tensors_that_are_not_the_models_are_refused(tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tensors={"blk.1.attn_k.weight": (256, 256)})
    with pytest.raises(CheckpointError, match=r"k_proj\.weight must have shape \[128, 256\], got \[256, 256\]"):
        read(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", only=[name for name in shapes() if name != "blk.0.ffn_up.weight"])
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight.*got None"):
        read(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf")
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.truncate((tmp_path / "m.gguf").stat().st_size - 100)
    with pytest.raises(CheckpointError, match="is truncated: tensor"):
        read(tmp_path / "m.gguf")
    assert not list(own_cache.glob("m-*/"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "q4_0"}, "quantize must be None or one of ('gguf', 'int8', 'int4'), got 'q4_0'"),
        ({"quantize": True}, "quantize must be None or one of ('gguf', 'int8', 'int4'), got True"),
        ({"dtype": "bf16"}, "dtype must be \"auto\" or \"float32\" with quantize='gguf' on a CPU, got 'bfloat16'"),
        (
            {"device": "cuda"},
            "device must be \"cpu\" with quantize='gguf' (a GPU takes one of ('int8', 'int4')), got 'cuda'",
        ),
        ({"interface": "hf"}, 'interface must be "runtime" with quantize=\'gguf\', got "hf"'),
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
        read(Path("demo"), **options)
    assert str(refused.value).startswith(message)


def test_sources_without_blocks_are_refused_before_they_are_fetched(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.checkpoint.hub.find", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InvalidArgument, match=r"'gguf' takes a GGUF file or 'demo', got a folder: .*tiny$"):
        read(tiny_folder)
    with pytest.raises(InvalidArgument, match=r"'gguf' takes a GGUF file or 'demo', got a hub id: google/gemma-2-2b$"):
        load("google/gemma-2-2b", device="cpu", quantize="gguf")
    with pytest.raises(FileNotFoundError, match=r"no model at .*gone\.gguf"):
        read(tiny_folder / "gone.gguf")


def test_the_machines_page_counts_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "read_bandwidth_gb_s", lambda _: 10.0)
    write_gguf(tmp_path / "m.gguf")
    page = info.gather(tmp_path / "m.gguf", device="cpu", quantize="gguf")
    plan = resolved(tmp_path / "m.gguf").plan
    assert (page.quantize, page.dtype, page.weights) == ("gguf", "float32", plan.weights)
    assert page.ceilings[0].bytes_per_token == plan.bytes_per_token(1)
    assert "float32, matrices in GGUF's blocks\n" in str(page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--quantize", "q4_0", "A"], "--quantize: invalid choice: 'q4_0' (choose from"),
        (["generate", "--quantize", "gguf", "--dtype", "bf16", "A"], 'dtype must be "auto" or "float32" with'),
        (["chat", "--quantize", "gguf", "google/gemma-2-2b-it"], "takes a GGUF file or 'demo', got a hub id: google/"),
        (["info", "--quantize", "gguf", "--plan"], "--quantize gguf is for a CPU, --plan h100 for a GPU"),
    ],
    ids=["another value", "another dtype", "a hub id", "a GPU's cost sheet"],
)
def test_the_command_line_says_what_is_expected(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.checkpoint.hub.find", lambda *_: pytest.fail("asked the hub"))
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(("dtype", "device"), [("bfloat16", "cpu"), ("float32", "meta"), ("float32", "cuda:0")])
def test_a_config_holds_no_other_combination(dtype: str, device: str) -> None:
    with pytest.raises(InvalidArgument, match="with quantize='gguf'"):
        RuntimeConfig(device, dtype, quantize="gguf")


def test_with_a_dtype_a_file_is_converted(tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    assert read(tmp_path / "m.gguf", quantize=None, dtype="bf16").dtype == torch.bfloat16
    read(tmp_path / "m.gguf")
    converted, in_place_folder = sorted(own_cache.glob("m-*/"), key=lambda folder: len(folder.name))
    assert (converted / "model.safetensors").is_file() and not (in_place_folder / "model.safetensors").exists()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (converted / name).read_bytes() == (in_place_folder / name).read_bytes()


@pytest.mark.parametrize(
    ("kind", "options", "quantize"),
    [
        ("Q4_0", {}, "gguf"),
        ("Q8_0", {}, "gguf"),
        ("Q8_0", {"dtype": "fp32"}, None),
        ("Q8_0", {"eager": True}, None),
        ("Q8_0", {"interface": "hf"}, None),
        ("BF16", {}, None),
        ("Q2_K", {}, None),
        ("Q4_0", {"quantize": "int8"}, "int8"),
    ],
    ids=str,
)
def test_blocks_are_what_a_file_is_read_in_unless_another_form_is_asked_for_or_smaller(
    tmp_path: Path, kind: str, options: dict[str, Any], quantize: str | None
) -> None:
    write_gguf(tmp_path / "m.gguf", kind=kind)
    model = read(tmp_path / "m.gguf", **{"quantize": None} | options)
    dtype = torch.float32 if quantize or options.get("dtype") else torch.bfloat16
    assert model.dtype == dtype
    if "interface" not in options:
        assert model.runtime.quantize == quantize


def test_where_no_kernel_reads_blocks_a_file_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "missing", lambda dtype: "numba is not installed")
    write_gguf(tmp_path / "m.gguf")
    assert read(tmp_path / "m.gguf", quantize=None).dtype == torch.bfloat16

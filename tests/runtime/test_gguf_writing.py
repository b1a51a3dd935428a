"""Models written as quantised GGUF files: values, config and tokenizer come back, llama.cpp answers the same, and
nothing is left where it fails."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.api import load
from runtime.checkpoint.cache import CACHE_ENV
from runtime.checkpoint.gguf import writing
from runtime.checkpoint.gguf.conversion import convert
from runtime.checkpoint.gguf.file import GgufFile
from runtime.checkpoint.gguf.names import file_name
from runtime.checkpoint.gguf.tokenizer import NORMAL, USER_DEFINED
from runtime.checkpoint.gguf.vocabulary import vocabulary
from runtime.checkpoint.sources import demo_file
from runtime.cli.main import main
from runtime.hugging_face.shared_weights import hugging_face, named_weights
from runtime.loading import read_config
from runtime.text.tokenizer_files import read_tokenizer

from . import gguf_files
from .gguf_files import HIDDEN, TOKENS, shapes, write_gguf

gguf = pytest.importorskip("gguf", reason="needs the demo extra")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPACES = 30  # tokens of several, in the demo
MERGED = ["▁a", "bc", "▁abc"]
METADATA = {
    "tokenizer.ggml.tokens": [*TOKENS, *MERGED],
    "tokenizer.ggml.token_type": [3] * 5 + [6] * 256 + [1] * 4 + [4] + [1] * 3,
    "tokenizer.ggml.scores": [-1000.0] * 5 + [0.0] * 256 + [-10.0] * 4 + [-1000.0] + [-1.0, -2.0, -3.0],
    "tokenizer.ggml.eot_token_id": 4,
    "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small model with a tokenizer as a folder of safetensors."""

    def make(family: str = "gemma3", **options: Any) -> Path:
        tensors = {"token_embd.weight": (len(TOKENS) + len(MERGED), HIDDEN)} | options.pop("tensors", {})
        write_gguf(tmp_path / "source.gguf", family, "F32", metadata=METADATA, tensors=tensors, **options)
        return shutil.copytree(convert(tmp_path / "source.gguf"), tmp_path / "source")

    return make


def quantize(source: str | Path, to: str, out: Path) -> dict[str, torch.Tensor]:
    """The values that this runtime reads from what it wrote."""
    assert main(["quantize", str(source), "--to", to, str(out)]) == 0
    model = load(out, device="cpu", max_seq_len=64, quantize="gguf", progress=False)
    return {name: value for name, value in named_weights(model).items() if value is not None}


def expected(name: str, value: torch.Tensor, to: str) -> np.ndarray:
    given = value.float().numpy()
    if value.dim() == 1:
        return (given + np.float32(1)) - np.float32(1)
    kind = gguf.GGMLQuantizationType["Q8_0" if name in (EMBEDDING, HEAD) else to.upper()]
    values: np.ndarray = gguf.dequantize(gguf.quantize(given, kind), kind)
    return values


@pytest.mark.parametrize("to", ["q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_a_folder_comes_back(folder_of: Callable[..., Path], tmp_path: Path, family: str, to: str) -> None:
    folder, out = folder_of(family), tmp_path / "out.gguf"
    weights, stored = quantize(folder, to, out), load_file(folder / "model.safetensors")
    assert weights.keys() == stored.keys() | {HEAD}
    for name, value in stored.items():
        np.testing.assert_array_equal(weights[name].numpy(), expected(name, value, to), err_msg=name)
    tensors, kind = GgufFile(out).tensors, {"q8_0": "Q8_0", "q4_0": "Q4_0"}[to]
    assert {tensor.ggml_type for tensor in tensors.values()} == {"F32", "Q8_0", kind}
    assert tensors["token_embd.weight"].ggml_type == "Q8_0" and tensors["blk.1.ffn_down.weight"].ggml_type == kind
    metadata = GgufFile(out).metadata
    assert metadata["general.file_type"] == {"q8_0": 7, "q4_0": 2}[to] and metadata["general.name"] == "source"
    again = load(out, device="cpu", max_seq_len=64, progress=False)
    assert again.config == read_config(folder)
    theirs = read_tokenizer(folder)
    assert theirs is not None and again.tokenizer is not None
    for text in ("  abc abcc", "a  b\n", "<eos>é", " abc" * 5):
        assert again.tokenizer.encode(text) == theirs.backend.encode(text).ids
    assert again.tokenizer.apply_chat([{"role": "user", "content": "ab"}])


def test_a_gguf_files_keys_and_blocks_stay(tmp_path: Path) -> None:
    kinds = {"token_embd": "Q6_K", "attn_q": "Q4_0", "ffn_down": "Q5_0"}
    keys = {"general.name": "mine", "split.count": 0, "quantize.imatrix.file": "x", "general.size_label": "1M"}
    kind = {name: kinds.get(name.split(".")[-2], "Q8_0") for name in shapes()}
    values = write_gguf(tmp_path / "m.gguf", kind=kind, metadata=keys)
    weights = quantize(tmp_path / "m.gguf", "q4_0", tmp_path / "out.gguf")
    for name, value in weights.items():
        if name == HEAD:
            continue
        source = values[file_name(name, "gemma3")]
        if value.dim() == 1:
            np.testing.assert_array_equal(value.numpy(), source - 1)
        elif "q_proj" in name:  # its blocks are in the type already
            np.testing.assert_array_equal(value.numpy(), source)
        else:
            np.testing.assert_array_equal(value.numpy(), expected(name, torch.from_numpy(source), "q4_0"))
    before, after = GgufFile(tmp_path / "m.gguf").metadata, GgufFile(tmp_path / "out.gguf").metadata
    assert after.pop("general.file_type") == 2 and after.pop("general.quantization_version") == 2
    assert after == {key: value for key, value in before.items() if not key.startswith(("split.", "quantize."))}


def test_keys_of_other_programs_keep_their_values(tmp_path: Path) -> None:
    """Whatever type they have; of numbers fp32 alone is certain, which all readers of Gemma's own keys expect."""
    numbers = {"UINT64": 2**64 - 1, "INT64": -(2**40), "INT8": -5, "UINT32": 2**32 - 1, "FLOAT64": 1e300, "BOOL": True}
    keys: dict[str, tuple[str, Any, str | None]] = {name: (name, value, None) for name, value in numbers.items()}
    keys |= {f"{name}s": ("ARRAY", [value, value], name) for name, value in numbers.items()}
    keys |= {"text": ("STRING", "", None), "texts": ("ARRAY", ["", "a\nb"], "STRING"), "half": ("FLOAT32", 0.5, None)}
    keys["infinite"] = ("FLOAT32", float("-inf"), None)
    types = gguf.GGUFValueType

    def add(writer: Any, key: str, value: Any) -> None:
        kind, given, items = value if isinstance(value, tuple) else (None, value, None)
        if kind is None:
            plain(writer, key, given)
        else:
            writer.add_key_value(key, given, types[kind], items and types[items])

    with pytest.MonkeyPatch.context() as patch:
        plain = gguf_files._add
        patch.setattr(gguf_files, "_add", add)
        write_gguf(tmp_path / "m.gguf", metadata={f"other.{name}": value for name, value in keys.items()})
    quantize(tmp_path / "m.gguf", "q8_0", tmp_path / "out.gguf")
    written = GgufFile(tmp_path / "out.gguf").metadata
    assert {name: written[f"other.{name}"] for name in keys} == {name: value for name, (_, value, _) in keys.items()}


def test_a_tokenizer_that_pads_and_truncates_is_written_without(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    padding = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    tokenizer["padding"] = padding | {"pad_to_multiple_of": None}
    tokenizer["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    quantize(folder, "q8_0", tmp_path / "out.gguf")
    assert GgufFile(tmp_path / "out.gguf").metadata["tokenizer.ggml.add_bos_token"] is True


def test_others_partial_files_are_left_alone(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out.gguf.partial").write_text("mine")
    quantize(folder_of(), "q8_0", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf.partial").read_text() == "mine"
    assert {path.name for path in tmp_path.glob("out*")} == {"out.gguf", "out.gguf.partial"}


def test_weights_too_small_for_a_scale_become_zeros_without_a_warning(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folder_of()
    stored = load_file(folder / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    stored[down] = stored[down].clone() * 1e-38
    save_file(stored, folder / "model.safetensors")
    for to in ("q8_0", "q4_0"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert not quantize(folder, to, tmp_path / f"{to}.gguf")[down].any()


def test_a_head_of_its_own(folder_of: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Gemma 3's is written; llama.cpp reads none for the others."""
    for family in ("gemma3", "gemma2"):
        folder = folder_of(family)
        stored = load_file(folder / "model.safetensors")
        stored[HEAD] = stored[EMBEDDING] * 2
        save_file(stored, folder / "model.safetensors")
        if family == "gemma3":
            weights = quantize(folder, "q4_0", tmp_path / "out.gguf")
            np.testing.assert_array_equal(weights[HEAD].numpy(), expected(HEAD, stored[HEAD], "q4_0"))
            shutil.rmtree(folder)
        else:
            refused(folder, tmp_path / "none.gguf", "reads the embedding as gemma2's head, this model has", capfd)


def refused(source: Path, out: Path, message: str, capfd: pytest.CaptureFixture[str], to: str = "q4_0") -> None:
    """That quantising ends with one line, and leaves nothing."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    capfd.readouterr()
    assert main(["quantize", str(source), "--to", to, str(out)]) == 2
    given = capfd.readouterr()
    assert message in given.err and given.err.count("\n") == 1 and not given.out
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else []) == before


def raising(error: BaseException) -> Callable[..., None]:
    def raises(*_: Any) -> None:
        raise error

    return raises


def test_files_that_cannot_be_written_are_one_line(
    folder_of: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = folder_of(), tmp_path / "out.gguf"
    (tmp_path / "there.gguf").write_bytes(b"kept")
    refused(folder, tmp_path / "there.gguf", "there.gguf exists: name another file, or remove it", capfd)
    assert (tmp_path / "there.gguf").read_bytes() == b"kept"
    refused(folder, tmp_path / "gone" / "out.gguf", f"cannot write {tmp_path}/gone/out.gguf: no folder", capfd)
    refused(folder, tmp_path / f"{'x' * 250}.gguf", "File name too long", capfd)
    (tmp_path / "link.gguf").symlink_to("nowhere")
    refused(folder, tmp_path / "link.gguf", "link.gguf exists: name another file, or remove it", capfd)
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        refused(folder, out, "out.gguf: 1 MB are needed, 0 MB are free", capfd)
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", raising(OSError(28, "No space")))
        refused(folder, out, "out.gguf: No space", capfd)
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "open_output_file", raising(PermissionError(13, "Denied")))
        refused(folder, out, "out.gguf: Denied", capfd)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "q4_0_of", raising(KeyboardInterrupt()))
        before = sorted(tmp_path.iterdir())
        assert main(["quantize", str(folder), "--to", "q4_0", str(out)]) == 130
        assert sorted(tmp_path.iterdir()) == before


def test_models_that_a_file_cannot_hold_are_named(
    folder_of: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = folder_of(), tmp_path / "out.gguf"
    stored = load_file(folder / "model.safetensors")

    def changed(name: str, value: float) -> None:
        tensors = {key: tensor.float() for key, tensor in stored.items()}
        tensors[name].view(-1)[7] = value
        save_file(tensors, folder / "model.safetensors")

    down = "model.layers.1.mlp.down_proj.weight"
    changed(down, float("nan"))
    refused(folder, out, f"tensor {down} holds a value that is not finite", capfd)
    changed(down, 1e6)
    refused(folder, out, f"tensor {down} does not fit Q4_0: a group's scale must be at most 65504", capfd)
    changed(EMBEDDING, 1e7)
    refused(folder, out, f"tensor {EMBEDDING} does not fit Q8_0: a weight is beyond 8319008", capfd)
    save_file(stored, folder / "model.safetensors")

    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"layer_types": ["full_attention", "sliding_attention"]}, "cannot express this model's layers:"),
        ({"query_pre_attn_scalar": 77}, "cannot express this model's attention_scale:"),
        ({"eos_token_id": [1, 4, 5, 6]}, "names 1 to 3 tokens that end an answer, the model has 4"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        (folder / "generation_config.json").unlink(missing_ok=True)
        refused(folder, out, message, capfd)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer, named = (json.loads((folder / f"{name}.json").read_text()) for name in ("tokenizer", "tokenizer_config"))
    merges, ids = tokenizer["model"]["merges"], tokenizer["model"]["vocab"]
    after = tokenizer["post_processor"]
    for field, value, message in (
        ("model", tokenizer["model"] | {"merges": merges[1:]}, "merges are not those of"),
        (
            "model",
            tokenizer["model"] | {"vocab": ids | {"zzz": 5000}},
            "'zzz' must have an id below the model's 269, got 50",
        ),
        *(
            (
                "added_tokens",
                [each | {flag: True} for each in tokenizer["added_tokens"]],
                f"no {flag}, as token '<pad>'",
            )
            for flag in ("single_word", "lstrip", "rstrip")
        ),
        (
            "post_processor",
            after | {"single": 2 * after["single"][:1] + after["single"][1:]},
            "adds BOS to a text or nothing",
        ),
        ("normalizer", None, "not Gemma's SentencePiece BPE"),
    ):
        if field == "normalizer":  # else transformers puts Gemma's own in its place
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {field: value}))
        refused(folder, out, message, capfd)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": "a\ud800"}))
    refused(folder, out, r"a GGUF file's texts are Unicode, got 'a\ud800'", capfd)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(folder, out, "source has no tokenizer, which a GGUF file must have", capfd)


def test_a_width_that_blocks_do_not_divide_is_named(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_types": ["sliding_attention"] * 3}))
    refused(folder, tmp_path / "out.gguf", "has rows of 40 weights, Q8_0 and Q4_0 need a multiple of 32", capfd)


@pytest.mark.sweep
@pytest.mark.newest_only
def test_the_demos_vocabulary_is_llama_cpps(demo_folder: Path) -> None:
    """The demo's file was written by llama.cpp's converter. Converted to a folder and back, all is the same but for
    runs of spaces, which a folder keeps as "▁▁" among the tokens that merge, and for the tokens around an image, which
    are special in a folder."""
    theirs, config = GgufFile(demo_file()).metadata, read_config(demo_folder)
    files = read_tokenizer(demo_folder)
    assert files is not None
    tokenizer = json.loads(files.backend.to_str())
    ours = vocabulary(tokenizer, config, files.named["unk_token"], True, None)
    assert ours.keys() == {key for key in theirs if key.startswith("tokenizer.ggml.")}

    def kept(metadata: Mapping[str, Any], name: str) -> list[Any]:
        tokens, types = theirs["tokenizer.ggml.tokens"], theirs["tokenizer.ggml.token_type"]
        differ = [
            kind == USER_DEFINED and (not token.strip(" ") or token.endswith("_of_image>"))
            for token, kind in zip(tokens, types, strict=True)
        ]
        assert sum(differ) == SPACES + 2
        return [value for value, other in zip(metadata[name], differ, strict=True) if not other]

    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        assert kept(ours, name) == kept(theirs, name)
    types, scores = kept(theirs, "tokenizer.ggml.token_type"), kept(ours, "tokenizer.ggml.scores")
    for kind, score, given in zip(types, scores, kept(theirs, "tokenizer.ggml.scores"), strict=True):
        assert kind == NORMAL or score == given
    ranks = [score for kind, score in zip(types, scores, strict=True) if kind == NORMAL]
    assert ranks == sorted(set(ranks), reverse=True)
    for name in ours.keys() - {f"tokenizer.ggml.{each}" for each in ("tokens", "token_type", "scores")}:
        assert ours[name] == theirs[name], name


@pytest.mark.newest_only
def test_llama_cpp_computes_the_same_from_it(demo_folder: Path, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits: from files written here its logits are no further from Hugging Face's on
    the same values than from the demo's own file, which its converter wrote."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    text = "The history of the city begins with the first settlers. A dog running through the snow is a great way to"
    errors = {}
    for to in ("own", "q8_0", "q4_0"):
        file = demo_file() if to == "own" else tmp_path / f"{to}.gguf"
        if to != "own":
            assert main(["quantize", str(demo_folder), "--to", to, str(file)]) == 0
        engine = llama_cpp.Llama(str(file), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False)
        model = load(file, device="cpu", max_seq_len=64, quantize="gguf", progress=False)
        assert model.tokenizer is not None
        ids = model.tokenizer.encode(text)
        assert engine.tokenize(text.encode(), add_bos=True, special=True) == ids
        engine.eval(ids)
        theirs = hugging_face(json.loads((demo_folder / "config.json").read_text()), model)
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0].numpy()
        errors[to] = float(np.sqrt(np.square(engine.scores[: len(ids)] - logits).mean()))
    assert max(errors["q8_0"], errors["q4_0"]) <= errors["own"]

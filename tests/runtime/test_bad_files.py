"""Files that are not what they should be: each is refused in one line by an error of this package, and quickly."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import runtime
from runtime.checkpoint.files import JSON_LIMIT
from runtime.checkpoint.weights import is_tied, read_weights
from runtime.errors import CheckpointError, GemmaRuntimeError, ModelNotFound
from runtime.loading import resolve


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refused(folder: Path, *parts: str) -> None:
    started = time.monotonic()
    with pytest.raises(GemmaRuntimeError) as caught:
        runtime.load(folder, device="cpu", max_seq_len=32)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 5
    for part in parts:
        assert part in str(caught.value)


def bigger_than_allowed(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(JSON_LIMIT + 1)  # a hole: it takes no disk


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not valid JSON"),
    "deep brackets": (lambda path: path.write_bytes(b"[" * 100_000), "not valid JSON"),
    "deep objects": (lambda path: path.write_bytes(b'{"a":' * 100_000), "not valid JSON"),
    "deep and closed": (lambda path: path.write_bytes(b"[" * 100_000 + b"]" * 100_000), "not valid JSON"),
    "an endless number": (lambda path: path.write_bytes(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "a byte order mark": (lambda path: path.write_bytes(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "utf-16": (lambda path: path.write_bytes('{"a": 1}'.encode("utf-16")), "not valid JSON"),
    "latin-1": (lambda path: path.write_bytes(b'{"a": "\xe9"}'), "not valid JSON"),
    "a list": (lambda path: path.write_bytes(b"[]"), "JSON object, got list"),
    "huge": (bigger_than_allowed, "larger than 100 MB"),
    "a link to itself": (loop, "is not a file, but a broken link"),
    "a pipe": (pipe, "is not a file"),
    "a folder": (directory, "is not a file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_files(folder, name, damage):
    change, said = DAMAGE[damage]
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / name).touch()
    change(folder / name)
    refused(folder, name, said)


@pytest.mark.parametrize("damage", ["a link to itself", "a pipe", "a folder"])
def test_weights_that_are_no_file(folder, damage):
    DAMAGE[damage][0](folder / "model.safetensors")
    refused(folder, "model.safetensors", "is not a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_may_not_be_read(folder, name):
    (folder / name).chmod(0)
    refused(folder, name, "Permission denied")


@pytest.mark.parametrize("layers", [4, 9_999, 10_001, 10**9, 10**30])
def test_more_layers_than_there_are_tensors(folder, layers):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, f"{layers}", "num_hidden_layers")


@pytest.mark.parametrize("change", ["cut short", "grown", "replaced", "deleted"])
def test_a_file_that_changes_while_it_is_loaded(folder, change):
    import torch

    found = resolve(folder, device="cpu", max_seq_len=32)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    if change != "deleted":
        file.write_bytes({"cut short": data[:-999], "grown": data + b"\0", "replaced": data}[change])
    with pytest.raises(CheckpointError, match=r"model\.safetensors (has changed|cannot be read)"):
        read_weights(found.stored, found.config, torch.device("cpu"), torch.float32)
    assert is_tied(found.stored, torch.float32)


def test_a_file_cut_short_between_two_slices(folder, monkeypatch):
    import torch

    monkeypatch.setattr("runtime.checkpoint.stored_tensor.SLICE_BYTES", 100)
    found = resolve(folder, device="cpu", max_seq_len=32)
    tensor = found.stored["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="has been truncated"):
        tensor.copy_into(torch.empty(tensor.shape), lambda _: os.truncate(tensor.file, tensor.start + 10))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "no/such/place", "~nobody-of-that-name/x"])
def test_names_that_are_no_path(name):
    with pytest.raises(ModelNotFound) as caught:
        runtime.load(name, device="cpu")
    assert "\n" not in str(caught.value)

"""A name becomes a folder; each way of failing says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.checkpoint import sources
from runtime.errors import CheckpointError

from .gguf_files import write_gguf


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.checkpoint.hub.find", lambda *_: pytest.fail("asked the hub"))


def test_the_default_is_the_variable_then_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sources.MODEL_ENV, raising=False)
    assert sources.default_source() == "demo"
    monkeypatch.setenv(sources.MODEL_ENV, "")
    assert sources.default_source() == "demo"
    monkeypatch.setenv(sources.MODEL_ENV, "google/gemma-2-2b-it")
    assert sources.default_source() == "google/gemma-2-2b-it"


@pytest.mark.usefixtures("no_hub")
def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.resolve(tmp_path) == sources.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "google" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sources.resolve("google/gemma") == Path("google/gemma")  # a folder comes before a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.resolve("~/google") == tmp_path / "google"


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "./missing/model",
        "/missing/model",
        "a/b/c",
        "missing.gguf",
        "x/missing.gguf",
        "",
        "../a",
        "a@b",
        "@",
        "a/@b",
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_what_cannot_be_a_hub_id_is_not_asked_for(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder, a \.gguf file, a hub id"):
        sources.resolve(name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a file: expected a folder"):
        sources.resolve(tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match="int"):
        sources.resolve(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["m.gguf", "m.GGUF", "m", "m.bin"])
def test_a_gguf_file_is_known_by_its_content(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="needs the demo extra")
    monkeypatch.setenv("GEMMA_RUNTIME_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / name)
    assert (sources.resolve(tmp_path / name) / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["m.gguf", "m.GGUF"])
def test_a_file_that_is_gguf_by_name_only_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gguf", reason="needs the demo extra")
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"is not a GGUF file: it must begin with b'GGUF', got b'vers'"):
        sources.resolve(tmp_path / name)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for source in ("demo", tmp_path / "m.gguf"):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'gemma-runtime\[demo\]'"):
            sources.resolve(source)

"""A name becomes a folder; each way of failing says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from runtime import sources
from runtime.errors import CheckpointError

from .gguf_files import write_gguf


def http_error(kind: type[errors.HfHubHTTPError], text: str) -> errors.HfHubHTTPError:
    """An error of the hub without the HTTP response that its constructor asks for in some versions."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the download by an answer or an error, and records what was asked for."""

    class Hub:
        answer: Any = "/nowhere"
        asked: dict[str, Any] | None = None

    def snapshot_download(repo: str, **options: Any) -> str:
        Hub.asked = {"repo": repo, **options}
        if isinstance(Hub.answer, Exception):
            raise Hub.answer
        return Hub.answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return Hub


def test_the_default_is_the_variable_then_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sources.MODEL_ENV, raising=False)
    assert sources.default_source() == "demo"
    monkeypatch.setenv(sources.MODEL_ENV, "")
    assert sources.default_source() == "demo"
    monkeypatch.setenv(sources.MODEL_ENV, "google/gemma-2-2b-it")
    assert sources.default_source() == "google/gemma-2-2b-it"


def test_a_folder_is_itself(tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.resolve(tmp_path) == sources.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "google" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sources.resolve("google/gemma") == Path("google/gemma")  # a folder comes before a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.resolve("~/google") == tmp_path / "google"
    assert hub.asked is None


@pytest.mark.parametrize(
    "name", ["missing", "./missing/model", "/missing/model", "a/b/c", "missing.gguf", "x/missing.gguf", "", "../a"]
)
def test_what_cannot_be_a_hub_id_is_not_asked_for(name: str, hub: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder, a \.gguf file, a hub id"):
        sources.resolve(name)
    assert hub.asked is None


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
    with pytest.raises(CheckpointError, match=r"is not a GGUF file: it does not begin with b'GGUF'"):
        sources.resolve(tmp_path / name)


def test_downloads_only_what_is_needed(tmp_path: Path, hub: Any) -> None:
    hub.answer = str(tmp_path)
    assert sources.resolve("google/gemma-2-2b-it") == tmp_path
    assert hub.asked["repo"] == "google/gemma-2-2b-it"
    wanted = huggingface_hub.utils.filter_repo_objects(
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer.model",
            "chat_template.jinja",
            "pytorch_model.bin",
            "gemma-2-2b-it.gguf",
            "modeling_custom.py",
            "original/model.safetensors",
        ],
        allow_patterns=hub.asked["allow_patterns"],
        ignore_patterns=hub.asked["ignore_patterns"],
    )
    assert list(wanted) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (
            http_error(errors.GatedRepoError, "403 Client Error\nlong explanation"),
            PermissionError,
            "gated: accept its licence on https://huggingface.co/google/gemma-2-2b and set HF_TOKEN",
        ),
        (http_error(errors.RepositoryNotFoundError, "404\nx"), FileNotFoundError, "no such model on the hub.*HF_TOKEN"),
        (errors.LocalEntryNotFoundError("no network\nlong"), ConnectionError, "cannot be reached: check the network"),
        (errors.OfflineModeIsEnabled("offline"), ConnectionError, "cannot be reached"),
        (http_error(errors.HfHubHTTPError, "500 Server Error\nlong"), ConnectionError, "failed: 500 Server Error$"),
        (errors.HFValidationError("Repo id must"), FileNotFoundError, "no valid hub id"),
        (TimeoutError("read timed out"), ConnectionError, "failed: read timed out"),
        (OSError(28, "No space left on device"), ConnectionError, "No space left on device"),
    ],
    ids=["gated", "unknown", "no network", "offline", "server error", "bad id", "timeout", "disk full"],
)
def test_hub_failures_are_one_plain_line(hub: Any, failure: Exception, raised: type[Exception], message: str) -> None:
    hub.answer = failure
    with pytest.raises(raised, match=message) as caught:
        sources.resolve("google/gemma-2-2b")
    assert "\n" not in str(caught.value)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for source in ("demo", tmp_path / "m.gguf"):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'gemma-runtime\[demo\]'"):
            sources.resolve(source)

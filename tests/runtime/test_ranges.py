"""Ranges for profilers: the trace of one request, NVTX, and nothing where nobody looks."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import tempfile
from contextlib import contextmanager

import pytest
import torch

import runtime
from runtime.cli.main import main
from runtime.engine import ranges
from runtime.engine.graph import runs_compiled

PROMPT, TOKENS = "the dog", 6
STEP, OPERATIONS = "gemma: step", ("decode_attention", "gated_mlp", "lm_head_argmax", "qkv_projection", "advance")


def inside(inner, outer):
    """Whether an event begins and ends while another goes on, by the clock's microsecond fractions."""
    return outer["ts"] - 0.01 <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.01


def events_of(file):
    traced = json.loads(file.read_text())["traceEvents"]
    return [event for event in traced if event.get("ph") == "X" and event["name"].startswith("gemma: ")]


@pytest.mark.parametrize("how", [[], ["--eager"]], ids=["compiled", "eager"])
def test_a_trace_has_the_steps_and_their_operations_nested_in_time(how, tiny, tiny_folder, tmp_path, capsys):
    file = tmp_path / "trace.json"
    options = ["--device", "cpu", "--max-seq-len", "128", "--max-new-tokens", str(TOKENS), "--trace", str(file), *how]
    assert main(["profile", PROMPT, "--model", str(tiny_folder), *options]) == 0
    printed = capsys.readouterr().out
    new_tokens = len(runtime.generate(tiny, PROMPT, max_new_tokens=TOKENS).token_ids)
    assert new_tokens > 2

    events = sorted(events_of(file), key=lambda event: event["ts"])
    steps = [event for event in events if event["name"] == STEP]
    assert len(steps) == new_tokens - 1, "the first token is the prompt's"
    assert len({(event["pid"], event["tid"]) for event in events}) == 1
    for earlier, later in itertools.pairwise(steps):
        assert earlier["ts"] + earlier["dur"] <= later["ts"] + 0.01
    names = [event["name"] for event in events]
    assert names[0] == "gemma: tokenise" and names.index("gemma: prefill chunk") < names.index(STEP)
    assert names.count("gemma: readback") == new_tokens
    assert ("gemma: capture, decoding" in names) == (runs_compiled(tiny) and not how)

    layers = len(tiny.config.layers)
    for step in steps:
        within = [
            event["name"].removeprefix("gemma: ") for event in events if event is not step and inside(event, step)
        ]
        assert {*OPERATIONS} <= {*within}
        assert within.count("decode_attention") == layers and within.count("advance") == 1
    for step in steps:
        spent = sum(event["dur"] for event in events if event is not step and inside(event, step))
        assert 0 < spent <= step["dur"] * 1.001
    for line in ("step", "decode_attention", "tokens/s"):
        assert line in printed


def test_a_traced_answer_is_the_same(tiny):
    from runtime.inspection.trace import trace

    plain = runtime.generate(tiny, PROMPT, max_new_tokens=TOKENS)
    traced = trace(tiny, PROMPT, TOKENS)
    assert json.loads(traced.chrome)["traceEvents"]
    assert traced.result.token_ids == plain.token_ids
    assert {one.name: one.count for one in traced.ranges}["step"] == len(plain.token_ids) - 1
    assert runtime.generate(tiny, PROMPT, max_new_tokens=TOKENS).token_ids == plain.token_ids


@pytest.fixture
def profiled(tiny, tmp_path_factory, monkeypatch):
    """A function that profiles a request into a file and returns the exit code, and the temporary folder it does so
    with."""
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))  # torch's own, made there
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(runtime, "load", lambda *_, **__: tiny)
    return lambda file: main(["profile", PROMPT, "--max-new-tokens", "2", "--trace", str(file)]), temporary


def test_a_trace_goes_into_a_pipe(profiled, pipe):
    profile, _ = profiled
    path, text = pipe
    assert profile(path) == 0
    assert json.loads(text())["traceEvents"] and path.is_fifo()


@pytest.mark.parametrize(
    "name",
    [b"\xff.json", b"two\nlines.json", b"a" * 255, b"a.json.gz"],
    ids=["not Unicode", "two lines", "long", "compressed"],
)
def test_a_trace_may_have_any_name(name, profiled, tmp_path):
    profile, temporary = profiled
    file = tmp_path / os.fsdecode(name)
    assert profile(file) == 0
    content = gzip.decompress(file.read_bytes()) if name.endswith(b".gz") else file.read_bytes()
    assert json.loads(content)["traceEvents"]
    assert [*tmp_path.iterdir()] == [file] and not [*temporary.iterdir()]


@pytest.mark.parametrize("state", ["full", "missing"])
def test_a_temporary_folder_that_cannot_be_used_is_named(state, profiled, tmp_path, monkeypatch, capsys):
    profile, temporary = profiled
    if state == "full":  # the profiler then logs an error and returns
        monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda *_: None)
    else:
        temporary.rmdir()
    assert profile(tmp_path / "trace.json") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "temporary folder" in err and str(temporary) in err
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_keeps_the_earlier_trace(profiled, tmp_path, monkeypatch, capsys):
    def replace(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    profile, _ = profiled
    file = tmp_path / "trace.json"
    file.write_text("before")
    monkeypatch.setattr(os, "replace", replace)
    assert profile(file) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [file] and file.read_text() == "before"


def test_ranges_go_to_nvtx_where_it_is_asked_for(tiny, monkeypatch):
    opened = []

    @contextmanager
    def record(name):
        opened.append(name)
        yield

    monkeypatch.setattr(ranges, "NVTX", True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", record)
    answer = runtime.generate(tiny, PROMPT, max_new_tokens=TOKENS)
    assert opened.count(STEP) == len(answer.token_ids) - 1
    assert {"gemma: tokenise", "gemma: prefill chunk", "gemma: readback", "gemma: advance"} <= {*opened}


def test_nobody_looks_by_default():
    assert not ranges.is_recorded()
    assert ranges.marked("step") is ranges.marked("readback"), "nothing is made"


def test_a_trace_that_cannot_be_written_is_refused_first(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "load", lambda *_, **__: pytest.fail("loaded a model"))
    assert main(["profile", PROMPT, "--trace", "/no/such/folder/a.json"]) == 2
    assert "no folder /no/such/folder" in capsys.readouterr().err

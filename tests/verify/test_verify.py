"""The audit as a user meets it: command line, report, interruption, and what can be wrong with what it is given."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from importlib import import_module

import pytest

import runtime
from runtime.checkpoint.cache import CACHE_ENV
from runtime.cli.main import main
from runtime.errors import CheckpointError
from runtime.parity.html import page
from runtime.parity.journal import Journal
from runtime.parity.prompts import SUITES, read_prompts, suite_prompts
from runtime.parity.records import Check
from runtime.parity.report import SCHEMA_VERSION, Report

from ..parsed_page import ParsedPage

PROMPTS = [[5, 9, 11], [7] * 30, list(range(20, 32))]


@pytest.fixture
def source(small_pair, one_thread, monkeypatch):
    monkeypatch.setattr(import_module("runtime.parity.invariances"), "REPETITIONS", 3)
    return small_pair("gemma3").ours.name


@pytest.fixture
def prompts_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in PROMPTS))
    return file


def test_the_command_writes_a_report_and_exits_with_0(source, prompts_file, tmp_path, capsys):
    json_out, html_out = tmp_path / "out.json", tmp_path / "out.html"
    options = ["--tokens", "6", "--device", "cpu", "--base-rate", "--json", str(json_out), "--html", str(html_out)]
    assert main(["verify", source, "--prompts", str(prompts_file), *options]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("passed: 3 of 3 prompts equal Hugging Face's 6 tokens")
    assert re.search(r"ok +fresh process +3 of 3 equal", out)
    assert re.search(r"batch of 8 +0 of 3 prompts differ", out) and re.search(r"eager attention +0 of 3", out)
    assert re.search(r"this runtime +0 of 3 prompts differ, largest fp64 gap 0$", out, re.MULTILINE)
    written = json.loads(json_out.read_text())
    assert (written["schema_name"], written["schema_version"]) == ("gemma-runtime.verify", SCHEMA_VERSION)
    report = Report.model_validate(written)
    assert report.model_dump(mode="json") == written
    assert [record.prompt_ids for record in report.prompts] == PROMPTS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", report.time) and report.texts == {}  # no tokenizer
    for field in ("checkpoint_sha256", "transformers", "torch", "triton", "device_name", "dtype", "attention", "cache"):
        assert report.environment[field]
    assert ParsedPage(html_out.read_text()).headings[0] == (1, "Passed: 3 of 3 prompts equal Hugging Face's 6 tokens")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json", "prompts.jsonl"]


def test_a_checkpoints_processors_are_left_out_on_both_sides(source, tmp_path):
    folder = tmp_path / "penalised"
    shutil.copytree(source, folder)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.7, "suppress_tokens": [5]}))
    assert runtime.load(folder, device="cpu").config.processors
    assert runtime.verify(folder, prompts=PROMPTS[:1], tokens=12, device="cpu", progress=False).passed


def test_the_oracle_runs_the_checkpoints_own_generation_config(source, tmp_path, monkeypatch):
    """Such a field is refused; were it not, the audit would see what it does."""
    folder = tmp_path / "searched"
    shutil.copytree(source, folder)
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 4}))
    options = {"prompts": PROMPTS[:1], "tokens": 12, "device": "cpu", "progress": False}
    with pytest.raises(CheckpointError, match="num_beams must be None or 1"):
        runtime.verify(folder, **options)
    monkeypatch.setattr(import_module("runtime.model.generation_config"), "_NEUTRAL", {})
    assert not runtime.verify(folder, **options).passed


def test_a_difference_exits_with_1_and_is_marked_in_the_page(source, prompts_file, tmp_path, monkeypatch, capsys):
    teacher_forcing = import_module("runtime.parity.teacher_forcing").TeacherForcing
    healthy = teacher_forcing.run

    def run(self, prompt, text):
        picked, logits = healthy(self, prompt, text)
        return [*picked[:2], (picked[2] + 1) % 499, *picked[3:]], logits

    monkeypatch.setattr(teacher_forcing, "run", run)
    html_out = tmp_path / "out.html"
    options = ["--tokens", "6", "--device", "cpu", "--html", str(html_out), "--oracle", "hf-static"]
    assert main(["verify", source, "--prompts", str(prompts_file), *options]) == 1
    out = capsys.readouterr().out
    assert "REFUSED" in out and out.splitlines()[-1].startswith("refused: 3 of 3") and "static cache" in out
    parsed = ParsedPage(html_out.read_text())
    assert "token 3 of 6:" in parsed.text and parsed.all("mark") and parsed.all("header", "bad")


@pytest.mark.newest_only  # about the journal
def test_an_interrupted_audit_resumes_and_gives_the_same_report(source, tmp_path, monkeypatch, capsys):
    options = {"prompts": PROMPTS, "tokens": 5, "device": "cpu", "base_rate": True, "progress": False}
    whole = runtime.verify(source, **options)
    comparison = import_module("runtime.parity.comparison").Comparison
    healthy, runs = comparison.record, []

    def record(self, model, teacher_forcing, prompt, *rest, **named):
        runs.append(prompt)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return healthy(self, model, teacher_forcing, prompt, *rest, **named)

    monkeypatch.setattr(comparison, "record", record)
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    out = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        runtime.verify(source, json_path=out, **options)
    (kept,) = (tmp_path / "cache" / "verify").iterdir()
    assert len(kept.read_text().splitlines()) == 2 and not out.exists()
    assert str(kept) in capsys.readouterr().err
    kept.write_bytes(kept.read_bytes() + b'\xff\n[1]\n5\n"x"\n{"truncated": {"na')
    again = runtime.verify(source, json_path=out, **options)
    assert again.model_copy(update={"time": whole.time}) == whole
    assert runs == [*PROMPTS, PROMPTS[2]]
    assert out.exists() and not kept.exists()


@pytest.mark.newest_only  # about the journal
def test_a_full_disk_keeps_what_is_done(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.json"

    def replace(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": [5, 6, 7]}\n')
    arguments = ["verify", source, "--prompts", str(file), "--tokens", "3", "--device", "cpu", "--json", str(out)]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"cannot write the report {out}: No space left on device" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "prompts.jsonl"]
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(import_module("runtime.parity.invariances"), "REPETITIONS", 3)
    monkeypatch.setattr(import_module("runtime.parity.comparison").Comparison, "record", None)  # nothing is run again
    assert main(arguments) == 0
    assert out.exists()


@pytest.mark.newest_only  # about files
def test_an_audit_into_a_pipe_leaves_nothing_beside_it(source, tmp_path, pipe):
    path, text = pipe
    runtime.verify(source, prompts=[[5, 6, 7]], tokens=2, device="cpu", json_path=path, progress=False)
    assert json.loads(text())["schema_version"] == SCHEMA_VERSION and path.is_fifo()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompts", "{tmp}/none.txt"], "No such file"),
        (["--prompts", "{tmp}/empty.txt"], "has no prompts: expected one a line"),
        (["--prompts", "{tmp}/latin.txt"], "must be UTF-8 text"),
        (["--prompts", "{tmp}/broken.jsonl"], "line 2: expected a JSON object with a prompt"),
        (["--prompts", "{tmp}/other.jsonl"], 'line 1: expected {"prompt": text or ids}, got'),
        (["--prompts", "{tmp}/ids.jsonl"], "must be from 0 to 498, got 499"),
        (["--prompts", "{tmp}/text.txt"], "has no tokenizer: give a list of token ids"),
        (["--suite", "tall"], "invalid choice: 'tall'"),
        (["--tokens", "0"], "expected at least 1, got 0"),
        (["--json", "{tmp}/no/out.json"], "no folder"),
        (["--html", "{tmp}"], "it is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(arguments, expected, source, tmp_path, capsys):
    files = {
        "empty.txt": b"\n \n",
        "latin.txt": "été".encode("latin-1"),
        "broken.jsonl": b'{"prompt": [5]}\n{"prompt":\n',
        "other.jsonl": b'{"text": "a"}\n',
        "ids.jsonl": b'{"prompt": [499]}\n',
        "text.txt": b"the dog\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    try:
        code = main(["verify", source, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("gemma-runtime: error: ") and err.count("\n") == 1 and expected in err


def test_an_audit_that_does_not_fit_is_refused_before_it_begins(source, monkeypatch, capsys):
    monkeypatch.setattr("runtime.model.memory_plan.available_bytes", lambda device: 1_000_000)
    with pytest.raises(ValueError, match=r"not enough memory on cpu for an audit: .*fp64 oracle.*but 1 MB are free"):
        runtime.verify(source, prompts=PROMPTS, device="cpu", progress=True)
    assert "Hugging Face's copy" in capsys.readouterr().err


def test_prompts_or_a_suite_and_an_oracle_there_is(source):
    with pytest.raises(ValueError, match="expected prompts or a suite, got both"):
        runtime.verify(source, prompts=PROMPTS, suite="code")
    with pytest.raises(ValueError, match="expected one of hf, hf-static, got 'vllm'"):
        runtime.verify(source, prompts=PROMPTS, oracle="vllm")


def test_the_suites_are_forty_different_prompts(tmp_path):
    prompts = suite_prompts()
    assert len({prompt.content for prompt in prompts}) == len(prompts) == 40
    for suite in SUITES:
        assert len(suite_prompts(suite)) == 10
    file = tmp_path / "two.txt"
    file.write_text("été\n\n雪\n", encoding="utf-8")
    assert [(prompt.name, prompt.content) for prompt in read_prompts(file)] == [("line 1", "été"), ("line 3", "雪")]


def test_an_audit_does_without_a_journal_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").touch()
    journal = Journal(tmp_path / "file" / "journal")
    for key in "ab":
        journal.add(key, Check(name="x", passed=True, detail=""))
    journal.remove()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the audit's progress cannot be written"
    ]


def test_a_journal_of_another_schema_is_not_taken(tmp_path):
    file = tmp_path / "journal"
    journal = Journal(file)
    journal.add("a", Check(name="x", passed=True, detail=""))
    file.write_text(file.read_text() + '{"b": {"name": "y"}}\n')
    again = Journal(file)
    assert again.find("a", Check) == Check(name="x", passed=True, detail="")
    assert again.find("b", Check) is None and again.find("c", Check) is None


@pytest.mark.newest_only
@pytest.mark.sweep
def test_the_demo_model(monkeypatch):
    """Text prompts, one past the sliding window, and the page with their texts."""
    monkeypatch.setattr(import_module("runtime.parity.invariances"), "REPETITIONS", 5)
    long = next(prompt.content for prompt in suite_prompts("long") if prompt.name == "long 1")
    report = runtime.verify("demo", prompts=["The sea is", long], tokens=8, device="cpu", dtype="bfloat16")
    assert report.passed, report
    assert "window one key short" in [fault.name for fault in report.faults]
    assert "The sea is" in ParsedPage(page(report)).text

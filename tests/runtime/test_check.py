"""`gemma-runtime check kernels`: what it refuses, what it writes, and its exit codes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch

from runtime.check.backends import Backend, compiled_backend
from runtime.check.checks import suite
from runtime.check.guard import Guarded
from runtime.check.run import check_kernels
from runtime.cli import check
from runtime.cli.main import main
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.ops import TorchOps

pytestmark = pytest.mark.skipif(INTERPRETING, reason="runs the command itself, which starts an interpreter of its own")
PROJECTIONS = "residual_linear"


class Faulty(TorchOps):
    """Plain PyTorch, after which a fault changes an operation's output."""

    def __init__(self, fault):
        self.fault = fault

    def run(self, operation):
        super().run(operation)
        self.fault(operation)


def backend(fault):
    def way(case):
        return case.on(Faulty(fault))

    return Backend("cpu", "cpu", {"planted": way}, (way,))


def checked(fault, operation=PROJECTIONS):
    planted = backend(fault)
    return check_kernels(planted, [check for check in suite(planted) if check.operation == operation])


def finished(report, tmp_path):
    junit = tmp_path / "junit.xml"
    code = check.finish(report, argparse.Namespace(json=None, junit=str(junit)))
    return code, ElementTree.parse(junit).getroot()


def right(operation):
    """No fault."""


def wrong_value(operation):
    operation.out[0, 0] += 0.1


def beside_its_place(operation):
    whole = operation.out
    torch.as_strided(whole, (1,), (1,), whole.storage_offset() + whole.numel()).fill_(7.0)


def other_in_every_run(operation):
    operation.out[0, 0] = torch.nextafter(operation.out[0, 0], torch.randn(()).sign().to(operation.out) * 1e4)


def by_the_batch(operation):
    if len(operation.out) == 5:
        operation.out[0, 0] = torch.nextafter(operation.out[0, 0], torch.tensor(1e4).to(operation.out))


def without_an_answer(operation):
    raise RuntimeError("out of\x00 resources")


def test_right_kernels_pass(tmp_path, capsys):
    report = checked(right)
    code, root = finished(report, tmp_path)
    assert code == 0 and report.passed
    assert root.attrib["failures"] == root.attrib["errors"] == "0"
    cases = root.findall("testsuite/testcase")
    assert len(cases) == int(root.attrib["tests"]) == len(report.outcomes) > 12
    assert all(float(case.attrib["time"]) >= 0 and case.attrib["classname"] == "cpu.residual_linear" for case in cases)
    assert not root.findall(".//failure")
    versions = {one.attrib["name"]: one.attrib["value"] for one in root.findall("testsuite/properties/property")}
    assert versions["torch"] == importlib.metadata.version("torch") and versions["device"] == "cpu"
    assert "residual_linear" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (wrong_value, "against fp64"),
        (beside_its_place, "bytes were written after out"),
        (other_in_every_run, "other bits"),
        (by_the_batch, "a batch of rows 0 to 4 gives other bits"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_wrong_kernel_fails(fault, message, tmp_path, capsys):
    code, root = finished(checked(fault), tmp_path)
    assert code == 1
    failures = root.findall(".//failure")
    assert len(failures) == int(root.find("testsuite").attrib["failures"]) > 0
    assert any(message in failure.attrib["message"] for failure in failures)
    out = capsys.readouterr().out
    assert message in out and "wrong" in out


def test_a_tie_to_the_highest_index_fails():
    def highest(operation):
        logits = operation.logits.float()
        operation.token.copy_(logits.shape[1] - 1 - logits.flip(1).argmax(1))

    named = {outcome.name for outcome in checked(highest, "lm_head_argmax").outcomes if outcome.is_bad}
    assert "equal rows, planted" in named and "ties of 16 bits, planted" in named


def test_a_kernel_that_cannot_run_is_an_error(tmp_path):
    code, root = finished(checked(without_an_answer), tmp_path)
    assert code == 1 and not root.findall(".//failure")
    error = root.findall(".//error")[0]
    assert error.attrib["message"] == "out of\ufffd resources" and "without_an_answer" in error.text


def test_where_nothing_ran_the_exit_code_says_so(tmp_path, capsys):
    cpu = compiled_backend()
    missing = Backend(cpu.kind, cpu.device, cpu.ways, cpu.equal, lambda dtype: "no compiled kernels: numba is needed")
    code, root = finished(check_kernels(missing), tmp_path)
    assert code == 3
    assert root.attrib["skipped"] == root.attrib["tests"] != "0"
    assert "numba is needed" in root.find(".//skipped").attrib["message"]
    assert "skipped: no compiled kernels: numba is needed" in capsys.readouterr().out


def test_compiled_kernels_pass_and_dtypes_without_them_are_skipped():
    cpu = compiled_backend()
    if cpu.missing(torch.float32):
        pytest.skip(cpu.missing(torch.float32))
    report = check_kernels(cpu, [check for check in suite(cpu) if check.operation == "advance"])
    assert report.passed
    assert {outcome.status for outcome in report.outcomes if outcome.dtype == "fp16"} == {"skipped"}
    assert {outcome.status for outcome in report.outcomes if outcome.dtype != "fp16"} == {"passed"}


def test_every_operation_with_a_compiled_kernel_is_checked():
    captured = {check.operation for check in suite(compiled_backend())}
    assert captured >= {"qkv_projection", "gated_mlp", "residual_linear", "lm_head_argmax", "advance"}
    assert captured >= {"decode_attention", "sequence_attention", "attention_and_projection"}


@pytest.mark.parametrize("at", [-1, 4], ids=["before", "after"])
def test_a_guard_tells_what_was_written_beside_a_tensor(at):
    guard = Guarded(torch.zeros(4))
    guard.assert_intact("x")
    torch.as_strided(guard.tensor, (1,), (1,), guard.tensor.storage_offset() + at).fill_(1.0)
    with pytest.raises(AssertionError, match=r"bytes were written \w+ x"):
        guard.assert_intact("x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "tpu"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--junit", "/no/such/folder/a.xml"], "no folder /no/such/folder"),
        (["--json", "/no/such/folder/a.json"], "no folder /no/such/folder"),
    ],
)
def test_bad_input_is_refused_in_a_line(arguments, message, capsys):
    assert main(["check", "kernels", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and message in err


@pytest.mark.sweep
@pytest.mark.newest_only
def test_the_interpreter_is_started_anew(tmp_path):
    """The whole command, in a folder with a module of a kernel's name, which must not be imported."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('imported')")
    report, junit = tmp_path / "report.json", tmp_path / "junit.xml"
    command = [sys.executable, "-m", "runtime", "check", "kernels", "--device", "interpret"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--json", str(report), "--junit", str(junit)],
        env=environment | {"PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    assert told["verdict"] is True and told["environment"]["kernels"] == "interpret" and told["skipped"] == 0
    operations = {outcome["operation"] for outcome in told["outcomes"]}
    assert {"rms_norm", "chunk_attention", "store_chunk", "rotate_heads", "sequence_attention"} <= operations
    assert ElementTree.parse(junit).getroot().attrib["tests"] == str(told["passed"])
    assert "checking chunk_attention" in done.stderr

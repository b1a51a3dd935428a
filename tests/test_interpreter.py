"""The kernels' own tests in Triton's interpreter, and on interpreted steps rows that come and go and guesses that are
checked. It has to be chosen before the kernels are imported: they get a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "kernels"
ON_STEPS = (
    "runtime/test_bandwidth.py::test_the_kernel_reads_every_word_once",
    "runtime/test_rows.py::test_whatever_comes_and_goes_every_answer_is_the_one_it_has_alone",
    "runtime/test_speculation.py::test_checked_guesses_leave_what_plain_steps_leave",
    "runtime/test_speculation.py::test_an_answer_may_end_with_the_context",
    "runtime/test_speculation.py::test_a_stop_token_among_right_guesses_ends_the_answer",
    "runtime/test_speculation.py::test_logits_that_are_not_finite[in the answer]",
    "runtime/test_speculation.py::test_answers_that_choose_their_tokens_choose_those_of_plain_steps[penalties, drawn]",
)
# About the operations' checks and the plain forms, which run where no Triton kernel does, as all about CPUs does.
WITHOUT_KERNELS = {"test_operations.py", "test_planted_faults.py", "test_quantized.py", "test_scaled_matrix.py"}


# A few of them for every run.
MAIN_CASES = "fp32 and (computes_what_its_reference_does or fp32_tokens_are_hugging_faces)"


def interpret(modules: list[str], *options: str) -> None:
    """Runs tests in the interpreter, all of which must pass."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=15", *options, *modules]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def modules() -> list[str]:
    paths = sorted(FOLDER.glob("test_*.py"))
    return [str(path) for path in paths if path.name not in WITHOUT_KERNELS and not path.name.startswith("test_cpu")]


@pytest.mark.newest_only  # a part of the sweep, which runs there too
def test_the_main_cases() -> None:
    interpret(modules(), "-k", MAIN_CASES)


@pytest.mark.sweep
def test_every_case(pytestconfig: pytest.Config) -> None:
    """All of them, or the others, where only sweeps are run."""
    marks = pytestconfig.getoption("markexpr")
    others = ["-k", f"not ({MAIN_CASES})"] if marks == "sweep" else []
    if "not newest_only" in marks:  # what the engine does with steps is the same with the oldest
        interpret(modules(), "-m", "not newest_only", *others)
    else:
        interpret(modules() + [str(FOLDER.parent / test) for test in ON_STEPS], *others)

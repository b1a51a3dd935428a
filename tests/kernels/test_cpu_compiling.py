"""Kernels compiled by several processes: each is there afterwards, whatever became of the processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="needs the cpu extra")
from runtime.kernels.cpu import compiling

pytestmark = pytest.mark.newest_only  # about numba alone

FUNCTIONS = """
from runtime.kernels.cpu.cache import compiled

@compiled
def twice(x):
    return x + x
"""

MAIN = """
import sys
sys.path.insert(0, sys.argv[1])
from numba import types
from runtime.kernels.cpu import compiling
import functions

compiling._processors = lambda: 2
{before}
wanted = [(functions.twice, (kind,)) for kind in (types.int64, types.float64)]
compiling.compile_all(wanted)
here = sum(kinds in kernel.overloads for kernel, kinds in wanted)
missing = sum(compiling._is_missing(kernel, kinds) for kernel, kinds in wanted)
print(here, missing, functions.twice(5), functions.twice(0.5), sum(functions.twice.stats.cache_hits.values()))
"""


def run(package: Path, before: str = "") -> list[str]:
    """How many of two forms the process compiled itself, how many nobody did, what they give, and how many came from
    the disk."""
    variables = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", MAIN.replace("{before}", before), str(package)]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    return ended.stdout.split()


@pytest.fixture
def package(tmp_path):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path


def test_another_process_compiles_a_part_and_this_one_finds_it(package):
    assert run(package) == ["1", "0", "10", "1.0", "1"]
    assert run(package, "compiling._started = None  # nothing is to be compiled") == ["0", "0", "10", "1.0", "2"]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("compiling._CHILD = 'raise SystemExit'", ["1", "1", "10", "1.0", "0"]),
        ("compiling._CHILD = 'import sys; sys.stdin.buffer.read(1); 1 / 0'", ["1", "1", "10", "1.0", "0"]),
        (
            "compiling._CHILD = 'import time; time.sleep(600)'; compiling.MOST_SECONDS = 1",
            ["1", "1", "10", "1.0", "0"],
        ),
        ("sys.executable = '/no/such/python'", ["2", "0", "10", "1.0", "0"]),
    ],
    ids=["ends at once", "fails", "hangs", "cannot be started"],
)
def test_what_another_process_does_not_compile_is_compiled_here(package, before, expected):
    assert run(package, before) == expected


def test_another_program_that_runs_python_is_not_started(monkeypatch):
    assert compiling._processors() >= 1
    for executable in ("", None, "/usr/bin/blender"):
        monkeypatch.setattr(sys, "executable", executable)
        assert compiling._processors() == 1

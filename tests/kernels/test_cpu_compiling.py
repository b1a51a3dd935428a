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
forms = [types.int64, types.float64]
{before}
wanted = [(functions.twice, (kind,)) for kind in forms]
compiling.compile_all(wanted)
here = sum(kinds in kernel.overloads for kernel, kinds in wanted)
missing = sum(compiling._missing_file(kernel, kinds) is not None for kernel, kinds in wanted)
print(here, missing, functions.twice(5), functions.twice(0.5), sum(functions.twice.stats.cache_hits.values()))
"""


def run(package: Path, before: str = "") -> list[str]:
    """How many of the forms the process compiled itself, how many nobody did, what they give, and how many came from
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


NOT_SAVED = """
import threading
forms.append(types.int32)
compiling._CHILD = compiling._CHILD.replace("serve()", "from pathlib import Path; Path.replace = None; serve()")

def compile_last(*arguments, compile=functions.twice.compile):
    for thread in set(threading.enumerate()) - {threading.current_thread()}:
        thread.join()
    return compile(*arguments)

functions.twice.compile = compile_last
"""


def test_a_process_that_cannot_save_gets_no_more_to_compile(package):
    assert run(package, NOT_SAVED) == ["2", "1", "10", "1.0", "0"]


UNREADABLE = """
import pathlib, warnings
warnings.simplefilter("ignore")  # that it cannot be read, on stderr
functions.twice._cache._cache_file._folder = pathlib.Path("too long" * 100)
"""


def test_what_cannot_be_looked_for_on_disk_is_compiled_here(package):
    """As in a folder that is closed to this user: root can open them all."""
    assert run(package) == ["1", "0", "10", "1.0", "1"]
    assert run(package, UNREADABLE) == ["1", "1", "10", "1.0", "0"]


NO_THREADS = """
import atexit, threading

def refuse(thread):
    raise RuntimeError("can't start new thread")

children, started = [], compiling._started
compiling._started = lambda: children.append(started()) or children[-1]
threading.Thread.start = refuse
atexit.register(lambda: print(*["ended" if child.returncode else "left" for child in children]))
"""


def test_without_threads_all_is_compiled_here_and_no_process_is_left(package):
    assert run(package, NO_THREADS) == ["2", "0", "10", "1.0", "0", "ended"]


def test_another_process_imports_as_this_one(package, monkeypatch):
    assert run(package, "from pathlib import Path; sys.path.append(Path('/none'))") == ["1", "0", "10", "1.0", "1"]
    monkeypatch.setattr(compiling, "_CHILD", "import sys; print(sys.dont_write_bytecode, sys.pycache_prefix)")
    for is_refused, prefix in ((True, str(package)), (False, None)):
        monkeypatch.setattr(sys, "dont_write_bytecode", is_refused)
        monkeypatch.setattr(sys, "pycache_prefix", prefix)
        with compiling._started() as child:
            assert child.stdout.read().decode().split() == [str(is_refused), str(prefix)]


def test_another_program_that_runs_python_is_not_started(monkeypatch):
    assert compiling._processors() >= 1
    for executable in ("", None, "/usr/bin/blender"):
        monkeypatch.setattr(sys, "executable", executable)
        assert compiling._processors() == 1

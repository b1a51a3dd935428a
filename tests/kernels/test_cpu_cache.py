"""The cache of compiled kernels: decoding goes on without one, a damaged entry is replaced, and no entry stands for
another source. In processes of their own, with small functions in place of the kernels."""

from __future__ import annotations

import ast
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="needs the cpu extra")
from runtime.kernels.cpu.cache import Entries, source_stamp

pytestmark = pytest.mark.newest_only  # about numba alone

SOURCES = {
    "inner.py": """
from runtime.kernels.cpu.cache import compiled

@compiled
def once(x):
    return x + 1
""",
    "functions.py": """
from inner import once
from runtime.kernels.cpu.cache import compiled

@compiled
def twice(x):
    return once(once(x))
""",
}

MAIN = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    {before}
    import functions
    print(functions.twice(5), functions.twice(0.5))
    print(sum(functions.twice.stats.cache_hits.values()), len(functions.twice.signatures))
    print([str(warning.message) for warning in seen])
"""


@pytest.fixture
def package(tmp_path):
    """A folder of two modules, with a compiled function that calls the other's."""
    folder = tmp_path / "package"
    folder.mkdir()
    for name, source in SOURCES.items():
        (folder / name).write_text(source)
    return folder


def run(package: Path, *, before: str = "pass", **environment: str) -> tuple[str, int, list[str]]:
    """What the functions give, how many forms came from the cache, and the warnings."""
    command = [sys.executable, "-c", MAIN.replace("{before}", before), str(package)]
    variables = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"} | environment
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    result, counts, warned = ended.stdout.splitlines()
    return result, int(counts.split()[0]), eval(warned)


RIGHT = "7 2.5"


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nbc"))


def test_a_second_process_loads_and_a_damaged_entry_is_replaced(package):
    assert run(package) == (RIGHT, 0, [])
    whole = {path: path.read_bytes() for path in entries(package)}
    assert len(whole) == 4
    for name in SOURCES:
        os.utime(package / name, (0, 0))  # unchanged all the same
    assert run(package) == (RIGHT, 2, [])
    damages = [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
        lambda data: b"x" + data,
    ]
    for path, damage in zip(whole, damages, strict=True):
        path.write_bytes(damage(whole[path]))
    result, hits, warned = run(package)
    assert (result, hits) == (RIGHT, 0)
    assert len(warned) == 1 and "is damaged, and replaced" in warned[0], warned
    assert run(package) == (RIGHT, 2, [])


def test_an_entry_is_stale_once_any_module_has_changed(package):
    """Here the one whose function is inlined. What is not replaced for want of space is not run either."""
    assert run(package) == (RIGHT, 0, [])
    old = entries(package)
    source = package / "inner.py"
    source.write_text("# a line more\n" + source.read_text().replace("x + 1", "x + 2"))
    full = NO_SPACE.replace("NUMBER", str(errno.ENOSPC))
    result, hits, warned = run(package, before=full)
    assert (result, hits, len(warned)) == ("9 4.5", 0, 1)
    assert "No space left" in warned[0]
    assert run(package) == ("9 4.5", 0, [])
    assert len(entries(package)) == len(old) and not set(old) & set(entries(package)), "stale entries are deleted"
    assert not list(package.rglob("*.tmp"))


def test_files_that_a_killed_process_left_are_deleted(tmp_path):
    """Not those that another may be writing, nor another function's."""
    names = ["module.one.stamp.1.tmp", "module.one.stamp.2.tmp", "module.other.stamp.3.tmp"]
    for name in names:
        (tmp_path / name).touch()
    for name in names[1:]:
        os.utime(tmp_path / name, (0, 0))
    Entries(tmp_path, "module.one", "stamp").save("key", "value")
    assert {path.name for path in tmp_path.glob("*.tmp")} == {names[0], names[2]}


KERNELS = Path(importlib.util.find_spec("runtime.kernels.cpu").origin).parent
MODULES = sorted(path.name for path in KERNELS.glob("*.py"))


@pytest.fixture
def copied(tmp_path):
    """A copy of the kernels' folder, of another time and with other files beside the sources."""
    folder = tmp_path / "cpu"
    shutil.copytree(KERNELS, folder, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__pycache__").mkdir()
    return folder


@pytest.mark.parametrize("module", MODULES)
def test_the_stamp_covers_every_module(module, copied):
    assert source_stamp(copied) == source_stamp(KERNELS)
    source_stamp.cache_clear()
    (copied / module).write_bytes((copied / module).read_bytes() + b"\n")
    assert source_stamp(copied) != source_stamp(KERNELS)


def test_the_stamp_covers_new_modules_and_the_compiler(copied, monkeypatch):
    stamps = {source_stamp(copied)}
    for change in (
        lambda: (copied / "new.py").touch(),
        lambda: (copied / "new.py").rename(copied / "renamed.py"),
        lambda: monkeypatch.setattr("numba.__version__", "0"),
        lambda: monkeypatch.setattr("llvmlite.__version__", "0"),
    ):
        change()
        source_stamp.cache_clear()
        stamps.add(source_stamp(copied))
    source_stamp.cache_clear()
    assert len(stamps) == 5


@pytest.mark.parametrize("module", [name for name in MODULES if name != "calls.py"])
def test_compiled_code_comes_from_this_folder_alone(module):
    """So the stamp covers all of it. calls.py, which knows tensors, compiles nothing."""
    tree = ast.parse((KERNELS / module).read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    ours = [name for name in imported if name.split(".")[0] == "runtime"]
    assert all(name.startswith("runtime.kernels.cpu") for name in ours), ours


NO_SPACE = """
    from pathlib import Path
    def full(self, data):
        self.touch()
        raise OSError(NUMBER, "No space left on device")
    Path.write_bytes = full
"""


def test_a_folder_that_cannot_be_written(package, tmp_path):
    """No home, a package folder that takes nothing, and a chosen folder that is none: a file stands in each place."""
    (package / "__pycache__").write_text("")
    nowhere = str(tmp_path / "file")
    Path(nowhere).write_text("")
    for chosen in ({}, {"NUMBA_CACHE_DIR": f"{nowhere}/below"}):
        result, hits, warned = run(package, HOME=nowhere, XDG_CACHE_HOME=f"{nowhere}/cache", **chosen)
        assert (result, hits) == (RIGHT, 0)
        assert len(warned) == 1 and "no locator available" in warned[0] and "NUMBA_CACHE_DIR" in warned[0]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_without_a_home():
    """As nobody, for whom file permissions hold: the package's folder and its cache are root's."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        package = Path(folder)
        package.chmod(0o755)
        for name, source in SOURCES.items():
            (package / name).write_text(source)
        become = "import os, runtime.kernels.cpu.cache; os.setgid(65534); os.setuid(65534)"
        result, hits, warned = run(package, before=become, HOME="/nonexistent", XDG_CACHE_HOME="/nonexistent")
        assert (result, hits, len(warned)) == (RIGHT, 0, 1)
        assert not entries(package)


# What numba's own threads would fail without, which decoding does not start.
LAYERS = {"no such layer": {"NUMBA_THREADING_LAYER": "green"}, "no OpenMP": {}}
ANSWER = """
import sys
if sys.argv[1] == "no OpenMP":
    sys.modules["numba.np.ufunc.omppool"] = None
from runtime.kernels.cpu import calls as cpu_calls
import runtime, torch
threads = torch.get_num_threads()
print(cpu_calls.missing(torch.float32))
assert torch.get_num_threads() == threads
model = runtime.load(sys.argv[2], device="cpu", max_seq_len=64)
print(list(runtime.generate(model, [2, 7, 9], max_new_tokens=3, ignore_eos=True).token_ids))
"""


def answered(case: str, environment: dict[str, str], small_pair, folder) -> str:
    """Why there are no compiled kernels, after an answer that is right all the same."""
    pair = small_pair("gemma3")
    pair.hf.save_pretrained(folder)
    command = [sys.executable, "-c", ANSWER, case, str(folder)]
    variables = os.environ | {"PYTHONSAFEPATH": "1"} | environment
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    told, answer = ended.stdout.splitlines()
    assert answer == str(pair.hf_greedy([2, 7, 9], 3)[0])
    return told


@pytest.mark.parametrize("case", LAYERS)
def test_compiled_kernels_do_without_numbas_threads(case, small_pair, tmp_path):
    assert answered(case, LAYERS[case], small_pair, tmp_path) == "None"


def test_without_a_compiler_there_is_a_reason(small_pair, tmp_path):
    assert answered("", {"NUMBA_DISABLE_JIT": "1"}, small_pair, tmp_path) == "NUMBA_DISABLE_JIT is set"

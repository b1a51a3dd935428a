"""The built wheel: what it holds, that it lives beside Hugging Face's `kernels`, and what importing it costs."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("kernels", "runtime", "bench", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run_python(code, *, cwd, path=None):
    """Standard output of `code` in a fresh interpreter whose sys.path starts with `path`."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that no earlier build's leftovers get into it."""
    sources = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, sources / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", sources / "dist", sources)
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the installed wheel and nothing else of ours."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", target, wheel)
    return target


def pip(command, *arguments):
    result = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-index", "--no-deps", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_wheel_holds_every_source_file_under_runtime(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"runtime"}

    expected = {"runtime/py.typed"}
    for folder, package in {"runtime": "runtime", "kernels": "runtime/kernels", "bench": "runtime/bench"}.items():
        for pattern in (
            "**/*.py",
            "**/*.html",
            "**/*.css",
            "**/*.js",
            "blocks/*.json",
            "prompts/*.json",
            "peers/*.txt",
        ):
            for file in (REPOSITORY / folder).glob(pattern):
                expected.add(f"{package}/{file.relative_to(REPOSITORY / folder).as_posix()}")
    assert {name for name in names if name.startswith("runtime/")} == expected


def test_installed_files_do_not_meet_those_of_the_hub_client(wheel):
    ours = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    hub_client = importlib.metadata.files("kernels")
    assert hub_client, "Hugging Face's kernels is not installed: make test installs it"
    assert ours.isdisjoint(str(file) for file in hub_client)


def test_runtime_hub_client_and_transformers_import_together(installed, tmp_path):
    code = """
import json, runtime, runtime.kernels, runtime.bench, kernels
from transformers import Gemma3ForCausalLM
import transformers.integrations.hub_kernels
print(json.dumps([runtime.__file__, runtime.kernels.__file__, runtime.bench.__file__, kernels.__file__]))
assert callable(kernels.get_kernel)
"""
    output = run_python(code, cwd=tmp_path, path=installed)
    runtime_file, kernels_file, bench_file, hub_client_file = json.loads(output.splitlines()[-1])
    assert Path(runtime_file) == installed / "runtime/__init__.py"
    assert Path(kernels_file) == installed / "runtime/kernels/__init__.py"
    assert Path(bench_file) == installed / "runtime/bench/__init__.py"
    assert not Path(hub_client_file).is_relative_to(installed)
    assert not Path(hub_client_file).is_relative_to(REPOSITORY / "kernels")


@pytest.mark.parametrize("folder", ["elsewhere", "repository"])
def test_the_environment_under_test_imports_the_same_from_any_folder(folder, tmp_path):
    cwd = REPOSITORY if folder == "repository" else tmp_path
    code = "import runtime, runtime.kernels, runtime.bench; print(runtime.kernels.__name__)"
    assert run_python(code, cwd=cwd).strip() == "runtime.kernels"


def test_import_is_light(tmp_path):
    code = """
import json, sys, time
start = time.perf_counter()
import runtime
time_ms = (time.perf_counter() - start) * 1e3
print(json.dumps([time_ms, [name for name in ("torch", "transformers", "triton", "numpy") if name in sys.modules]]))
"""
    runs = [json.loads(run_python(code, cwd=tmp_path)) for _ in range(5)]
    assert runs[0][1] == [], "imported before anything needs it"
    assert min(time_ms for time_ms, _ in runs) < 150

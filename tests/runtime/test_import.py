"""`import runtime`: quick and light, with the public names and no other."""

import importlib.metadata
import subprocess
import sys

import pytest

import runtime


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_loads_nothing_heavy_and_is_quick():
    code = """
import sys, time
started = time.perf_counter()
import runtime
seconds = time.perf_counter() - started
assert not {"torch", "transformers", "numpy", "tokenizers"} & set(sys.modules), sorted(sys.modules)
print(seconds)
"""
    assert min(float(python(code)) for _ in range(3)) < 0.15


def test_every_public_name_is_there_and_no_other():
    assert set(dir(runtime)) == {*runtime.__all__, "__version__"}
    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'sample'"):
        _ = runtime.sample


def test_the_version_is_the_distribution_s():
    assert runtime.__version__ == importlib.metadata.version("gemma-runtime")

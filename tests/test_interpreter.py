"""The kernels' own tests in Triton's interpreter, and rows that come and go on interpreted steps. It has to be chosen
before the kernels are imported: they get a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "kernels"
ROWS = "runtime/test_rows.py::test_whatever_comes_and_goes_every_answer_is_the_one_it_has_alone"
# These are about the operations' checks, the plain forms and the CPU's kernels, and run where no Triton kernel does.
WITHOUT_KERNELS = {
    "test_cpu.py",
    "test_cpu_cache.py",
    "test_cpu_products.py",
    "test_cpu_team.py",
    "test_operations.py",
    "test_planted_faults.py",
}


def test_kernels_in_the_interpreter(pytestconfig):
    modules = [str(path) for path in sorted(FOLDER.glob("test_*.py")) if path.name not in WITHOUT_KERNELS]
    modules.append(str(FOLDER.parent / ROWS))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    options = ["-q", "-p", "no:cacheprovider", "--durations=15", "-m", pytestconfig.getoption("markexpr")]
    command = [sys.executable, "-m", "pytest", *options, *modules]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout

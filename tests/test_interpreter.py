"""The kernels' own tests in Triton's interpreter, which has to be chosen before the kernels are imported: they get a
process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNEL_TESTS = Path(__file__).parent / "kernels" / "test_kernels.py"


def test_kernels_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNEL_TESTS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout

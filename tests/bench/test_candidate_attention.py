"""The candidates of decode attention against its plain PyTorch form, in Triton's interpreter: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.bench.candidates.attention import Candidate, Shape, Variant, copied, gate, gate_step, truth_of
from runtime.kernels.launch import INTERPRETING, Launcher

pytestmark = pytest.mark.slow  # candidates, not what is shipped: once a run is enough
CPU = torch.device("cpu")
WINDOW = 21
# heads, kv_heads, head_dim, window, q/k norm, scale, softcap
SHAPES = {
    "Gemma": (2, 1, 16, None, False, 16**-0.5, None),
    "Gemma 2": (4, 2, 16, WINDOW, False, 20**-0.5, 5.0),
    "Gemma 2, all keys": (4, 2, 16, None, False, 20**-0.5, 5.0),
    "Gemma 3": (2, 1, 32, WINDOW, True, 32**-0.5, None),
}
# Several steps in a run, a run for every step, and two levels of combining.
STEPS, RUNS, LEVELS = Variant(4, 4, 1, 16), Variant(8, 4, 1, 16), Variant(2, 32, 1, 16, 2)
CASES = [
    ("Gemma", LEVELS, 37, 4),
    ("Gemma 2", STEPS, 61, 4),
    ("Gemma 2, all keys", RUNS, 23, 4),
    ("Gemma 3", STEPS, 61, 8),
]


def shape_of(name: str) -> Shape:
    heads, kv_heads, head_dim, window, norms, scale, softcap = SHAPES[name]
    return Shape(name, 8, heads, kv_heads, head_dim, window, norms, False, scale, 1e-6, softcap, 64)


if not INTERPRETING:

    def test_candidates_in_the_interpreter():
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        root = Path(__file__).parents[2]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
        assert result.returncode == 0, result.stdout + result.stderr
        assert " passed" in result.stdout
        assert "skipped" not in result.stdout

else:

    @pytest.mark.parametrize(("name", "variant", "context", "rows"), CASES, ids=str)
    def test_candidate_agrees_with_the_plain_form(name: str, variant: Variant, context: int, rows: int):
        """At positions 0, 1 and past the window, with every slot that holds nothing NaN, a row alone bit for bit."""
        torch.manual_seed(0)
        step = copied(gate_step(shape_of(name), context, context, CPU, torch.float32), rows)
        given = gate(variant, Launcher(None), step, truth_of(step))
        assert given["relative_error"] < 2e-6
        assert given["row_bits_equal"]

    @pytest.mark.parametrize("fault", ["a key", "the row's bits"])
    def test_gate_refuses_a_wrong_result(fault: str):
        step = copied(gate_step(shape_of("Gemma"), 9, 9, CPU, torch.float32), 2)
        truth = truth_of(step)

        class Wrong(Launcher):
            def _start(self, kernel, grid, arguments, options, operation):
                super()._start(kernel, grid, arguments, options, operation)
                if fault == "a key":
                    operation.k_cache[0, 0, 3] += 1
                elif "out_ptr" in arguments and len(operation.qkv) == 1:
                    arguments["out_ptr"].mul_(1 + 1e-6)

        if fault == "a key":
            with pytest.raises(AssertionError, match="not the new one"):
                gate(STEPS, Wrong(None), step, truth)
        else:
            assert not gate(STEPS, Wrong(None), step, truth)["row_bits_equal"]

    def test_unused_parts_are_not_read():
        """Buffers hold NaN where no program writes."""
        step = copied(gate_step(shape_of("Gemma 3"), 5, 64, CPU, torch.float32), 2)
        candidate = Candidate(RUNS, step)
        candidate.run(Launcher(None), step)
        assert candidate.out.isfinite().all()
        assert candidate.runs.partial.isnan().any()

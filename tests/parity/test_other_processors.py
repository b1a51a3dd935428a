"""What holds on this processor holds on others: exact comparisons again in processes whose libraries are told to use
older instructions, as far as each obeys (MKL does on Intel's processors only)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.kernels.cpu import calls as cpu_calls

pytestmark = [pytest.mark.sweep, pytest.mark.newest_only]

PROCESSORS = {
    "avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "sse4": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
# The bits of operations and of rows, and a long run's tokens.
TESTS = {
    "test_ops_bitwise.py": "",
    "test_alignment.py": "",
    "test_batch.py": "8-fp32 or 2-bf16",
    "test_small_models.py": "prompt55 and gqa or gemma2-tight",
}
HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2"}  # no AVX-512
STEPS = 40


@pytest.mark.parametrize("processor", ["avx2", "sse4"])
def test_the_exact_comparisons_pass(processor: str) -> None:
    here = Path(__file__).parent
    environment = os.environ | PROCESSORS[processor] | {"OMP_NUM_THREADS": "1"}
    chosen = " or ".join(f"({name} and ({some}))" if some else name for name, some in TESTS.items())
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    run = subprocess.run(
        [*command, *(str(here / name) for name in TESTS)],
        env=environment, cwd=here.parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


def logits_of_compiled_steps(folder: str, dtype: str) -> str:
    """A digest of the logits of compiled steps from an empty cache, whose input no product of PyTorch has touched."""
    import runtime
    from runtime.engine.decode import stepper
    from runtime.families.state import new_state

    model = runtime.load(folder, device="cpu", dtype=dtype, max_seq_len=64, progress=False)
    state = new_state(model, 1, with_logits=True)
    assert state.logits is not None
    state.token[0] = 5
    state.x.copy_(model.weights.embedding[5] * state.embed_scale)
    step, digest = stepper(model, state), hashlib.sha256()
    assert state.graphs, "no step was captured"
    for _ in range(STEPS):
        step()
        digest.update(state.logits.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.skipif(bool(cpu_calls.missing(torch.float32)), reason="no compiled kernels here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_steps_have_the_same_bits(dtype: str, tmp_path: Path, small_pair) -> None:
    """Vectors of another width, the same sums. The kernels of the other processor are compiled once a machine."""
    folder = str(tmp_path / "model")
    small_pair("gemma3").hf.save_pretrained(folder)
    command = [sys.executable, "-P", __file__, folder, dtype]
    run = subprocess.run(command, env=os.environ | HASWELL, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [logits_of_compiled_steps(folder, dtype)]


@pytest.mark.skipif(bool(cpu_calls.missing(torch.float32)), reason="no compiled kernels here")
def test_processors_that_do_not_multiply_pairs_sum_in_the_same_order() -> None:
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "kernels/test_cpu_products.py"]
    run = subprocess.run(command, env=os.environ | HASWELL, cwd=tests, capture_output=True, text=True)
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout[-4000:] + run.stderr[-1000:]


if __name__ == "__main__":
    print(logits_of_compiled_steps(*sys.argv[1:]))

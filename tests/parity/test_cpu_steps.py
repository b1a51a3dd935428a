"""Decoding on a CPU's compiled kernels: in fp32 the tokens Hugging Face picks, and compiled once for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import runtime
from runtime.engine.decode import stepper, tokens
from runtime.engine.prefill import prefill
from runtime.families.state import new_state
from runtime.kernels.cpu import calls as cpu_calls

MISSING = cpu_calls.missing(torch.float32)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}")


def decoded(model, ids, count):
    state = new_state(model, 1)
    picked = [int(prefill(model, state, 0, ids)), *(row[0] for row in tokens(stepper(model, state), state, count - 1))]
    assert state.graphs, "no step was captured"
    return picked


@pytest.mark.parametrize("length", [1, 15, 40], ids=["one token", "up to the window", "past it"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_fp32_tokens_equal_hugging_face(family, length, small_pair, random_ids):
    pair, ids = small_pair(family), random_ids(length, seed=length)
    expected = pair.hf_greedy(ids, 60)[0]
    assert len(set(expected)) >= 16
    assert decoded(pair.ours, ids, 60) == expected


FRESH = """
import sys
import runtime
from runtime.kernels.cpu import operations as cpu
model = runtime.load(sys.argv[1], device="cpu", max_seq_len=64)
print(runtime.generate(model, [2, 5, 7], max_new_tokens=9, ignore_eos=True).token_ids)
kernels = [getattr(cpu, name) for name in ("qkv_projection", "decode_attention", "lm_head_argmax", "advance")]
for kernel in kernels:
    hits, misses = sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())
    assert hits == len(kernel.signatures) > 0 and not misses, (kernel, hits, misses)
"""


@pytest.mark.newest_only  # about numba alone
def test_a_second_process_compiles_nothing(small_pair):
    """After this one. tests/kernels/test_cpu_cache.py has a first one that finds nothing in its cache."""
    model = small_pair("gemma3").ours
    tokens = runtime.generate(model, [2, 5, 7], max_new_tokens=9, ignore_eos=True).token_ids
    command = [sys.executable, "-c", FRESH, model.name]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == f"{tokens}\n", run.stdout + run.stderr


LIMITED = """
import sys
import torch
import runtime
model = runtime.load(sys.argv[1], device="cpu", max_seq_len=64)
runtime.generate(model, [2, 5, 7], max_new_tokens=9)
print(torch.get_num_threads())
"""


def test_a_thread_limit_outlasts_the_first_step(tmp_path, small_pair):
    """Decoding starts threads of its own, and PyTorch's stay as many as they were."""
    small_pair("gemma3").hf.save_pretrained(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1"]

"""Processes forked from one that has a model: they answer, with the same tokens, and never wait for threads that have
not come along. In processes of their own, with a limit of time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

START = """
import importlib, multiprocessing, os, sys, threading
import torch
import runtime

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
model = runtime.load(folder, device="cpu", max_seq_len=128, max_batch=2, eager="eager" in sys.argv[3:])
PROMPT = [2, 7, 9] * 20

def answer(_=None):
    return list(runtime.generate(model, PROMPT, max_new_tokens=6, ignore_eos=True).token_ids)

def in_child(function):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, repr(function()).encode())
        os._exit(0)
    os.close(writer)
    told = os.read(reader, 10_000).decode()
    assert os.waitpid(child, 0)[1] == 0
    return told
"""

CASES = {
    "before the first answer": """
told = in_child(answer)
assert told == repr(answer()), told
""",
    "after the first answer": """
expected = answer()
assert in_child(answer) == repr(expected)
assert in_child(lambda: in_child(answer)) == repr(repr(expected)), "a child's child"
assert answer() == expected
""",
    "a pool": """
expected = answer()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(answer, range(4)) == [expected] * 4
""",
    "in a thread of the child": """
expected = answer()
def in_thread():
    told = []
    thread = threading.Thread(target=lambda: told.append(answer()))
    thread.start()
    thread.join()
    return told[0]
assert in_child(in_thread) == repr(expected)
""",
    "threads asked for in the child": """
expected = answer()
def asking():
    runtime.generate(model, PROMPT, max_new_tokens=1)
    return torch.get_num_threads(), answer()
assert in_child(asking) == repr((1, expected))
""",
    "with an unfinished stream": """
expected = answer()
pieces = runtime.stream(model, PROMPT, max_new_tokens=6, ignore_eos=True)
first = next(pieces).token_ids[0]
def beside_it():
    fresh = answer()
    another = runtime.stream(model, PROMPT, max_new_tokens=6, ignore_eos=True)
    next(another)
    pieces.close()
    assert answer() == fresh == [piece.token_ids[0] for piece in runtime.stream(
        model, PROMPT, max_new_tokens=6, ignore_eos=True)]
    return fresh
assert in_child(beside_it) == repr(expected), "a child answers beside a stream of its parent's"
assert in_child(lambda: [first, *(piece.token_ids[0] for piece in pieces)]) == repr(expected)
assert [first, *(piece.token_ids[0] for piece in pieces)] == expected
""",
    "while another thread loads the default model": """
import time
module = importlib.import_module("runtime.generation")
started, goes_on = threading.Event(), threading.Event()
def slow():
    started.set()
    goes_on.wait()
    return model
module._default_model = slow
thread = threading.Thread(target=runtime.generate, args=("ab",))
thread.start()
started.wait()
def ask():
    goes_on.set()
    return runtime.generate("ab", max_new_tokens=2).token_ids
told = in_child(ask)
goes_on.set()
thread.join()
assert told == repr(runtime.generate(model, "ab", max_new_tokens=2).token_ids)
""",
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("eager", ["", "eager"], ids=["compiled", "eager"])
def test_a_forked_child_answers(eager, threads, tiny_folder):
    """The cases in turn, in one process: the first before it has answered, the others after."""
    program = START + "".join(f"print({name!r}, flush=True)\n{case}" for name, case in CASES.items())
    command = [sys.executable, "-c", program, str(tiny_folder), str(threads), eager]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, (run.stdout, run.stderr)
    assert run.stdout.splitlines() == [*CASES]
    assert "Terminating" not in run.stderr

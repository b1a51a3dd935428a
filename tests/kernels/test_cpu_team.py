"""Threads that share the chunks of a call: which of them computes what, and when, changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from runtime import kernels
from runtime.kernels import cpu_calls
from runtime.kernels.launch import INTERPRETING
from runtime.model.config import MAX_BATCH, MAX_THREADS

from .cases import DEVICE

MISSING = cpu_calls.missing(torch.float32)
pytestmark = [
    pytest.mark.skipif(INTERPRETING or DEVICE != "cpu", reason="for tensors on a CPU, outside Triton's interpreter"),
    pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}"),
]


@contextmanager
def busy_cores():
    """A process that never waits for each core."""
    started = [
        subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)))
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def two_products():
    """Calls of which the second takes what the first gives, and where that ends up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 128, generator=generator)
    weights = [torch.randn(*shape, generator=generator) for shape in ((515, 128), (67, 515))]
    between, out = torch.full((2, 515), torch.nan), torch.full((2, 67), torch.nan)

    def both():
        kernels.residual_linear(between, x, weights[0])
        kernels.residual_linear(out, between, weights[1])

    return cpu_calls.captured(both), out


def test_any_number_of_threads_on_busy_cores_gives_the_same_bits():
    calls, out = two_products()
    cpu_calls.run(calls, 1)
    expected = out.clone()
    assert not expected.isnan().any()
    with busy_cores():
        for threads in (2, 3, 7) * 10:
            out.fill_(torch.nan)
            cpu_calls.run(calls, threads)
            assert torch.equal(out, expected), threads


def test_memory_may_go_as_soon_as_a_step_is_through():
    """While a late thread may still be reading it."""
    with busy_cores():
        for _ in range(10):
            calls, _ = two_products()
            cpu_calls.run(calls, 3)


def test_an_interrupt_costs_no_thread():
    """It is heeded when the step's machine code returns, and the next step takes the same threads."""
    from runtime.kernels import cpu

    calls, out = two_products()
    cpu_calls.run(calls, 3)
    expected, before, lead = out.clone(), threading.active_count(), cpu.lead

    def interrupted(words, code):
        lead(words, code)
        raise KeyboardInterrupt

    for _ in range(5):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(cpu, "lead", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cpu_calls.run(calls, 3)
    out.fill_(torch.nan)
    cpu_calls.run(calls, 3)
    assert torch.equal(out, expected)
    assert threading.active_count() == before


def test_fewer_threads_than_asked_for_do_all_the_work(monkeypatch):
    calls, out = two_products()
    cpu_calls.run(calls, 1)
    expected, start, asked = out.clone(), threading.Thread.start, []

    def refused(thread):
        asked.append(thread)
        if len(asked) > 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    out.fill_(torch.nan)
    cpu_calls.run(calls, 11)
    assert len(asked) == 3
    assert torch.equal(out, expected)


def team(threads):
    from runtime.kernels import cpu

    words = np.zeros(cpu.TEAM_WORDS, np.int64)
    words[cpu.THREADS] = threads
    for thread in range(threads):
        words[cpu.own(thread, cpu.PHASE)] = 1
    return cpu, words


@pytest.mark.parametrize("chunks", [1, 2, 5, 64])
def test_a_thread_that_stays_away_holds_nobody_up(chunks):
    cpu, words = team(3)
    absent = cpu.take(words, 1, chunks)  # begins one, and is then kept from its core
    written = []
    while (chunk := cpu.take(words, 0, chunks)) >= 0:
        assert cpu.may_write(words, 0, chunk)
        cpu.written(words, 0, chunk)
        written.append(chunk)
    assert sorted(written) == list(range(chunks))
    assert not cpu.may_write(words, 1, absent), "it would write over what others go on from"
    assert cpu.take(words, 1, chunks) == -1
    while cpu.alone(words, 0):
        cpu.written(words, 0, 0)
    assert not cpu.alone(words, 1), "done once already"


def test_a_thread_two_phases_behind_takes_nothing():
    cpu, words = team(2)
    for _ in range(2):
        while (chunk := cpu.take(words, 0, 6)) >= 0:
            assert cpu.may_write(words, 0, chunk)
            cpu.written(words, 0, chunk)
    assert cpu.take(words, 1, 6) == -1
    assert cpu.take(words, 1, 6) == -1
    assert cpu.take(words, 1, 6) >= 0


def test_limits_are_those_of_the_runtime():
    cpu, _ = team(1)
    assert (cpu.MOST_THREADS, cpu.MOST_ROWS) == (MAX_THREADS, MAX_BATCH)


def test_a_child_of_fork_has_threads_of_its_own():
    calls, out = two_products()
    cpu_calls.run(calls, 3)
    expected = out.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        out.fill_(torch.nan)
        cpu_calls.run(calls, 3)
        os._exit(0 if torch.equal(out, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    cpu_calls.run(calls, 3)
    assert torch.equal(out, expected)

"""Threads that share a call's chunks: the result does not depend on which thread computes what, or when."""

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

from runtime.check.case import DEVICE
from runtime.kernels import checks
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.launch import INTERPRETING
from runtime.model.config import MAX_BATCH, MAX_THREADS

MISSING = cpu_calls.missing(torch.float32)
pytestmark = [
    pytest.mark.skipif(INTERPRETING or DEVICE != "cpu", reason="for tensors on a CPU, outside Triton's interpreter"),
    pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}"),
]


@contextmanager
def busy_cores():
    """One busy process per core."""
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
    """Two calls, the second of which reads what the first writes, and the second's output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 128, generator=generator)
    weights = [torch.randn(*shape, generator=generator) for shape in ((515, 128), (67, 515))]
    between, out = torch.full((2, 515), torch.nan), torch.full((2, 67), torch.nan)

    def both(ops):
        ops.residual_linear(between, x, weights[0])
        ops.residual_linear(out, between, weights[1])

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


def test_memory_may_be_freed_once_a_step_is_over():
    """While a late thread may still be reading it."""
    with busy_cores():
        for _ in range(10):
            calls, _ = two_products()
            cpu_calls.run(calls, 3)


def test_what_two_threads_link_at_once_stays_where_it_is(monkeypatch):
    """A program holds addresses, so the code that another thread has linked meanwhile may not take their place."""
    from runtime.kernels.cpu import team

    linked, first = team._compiled_thunks, []
    monkeypatch.setattr(team, "_thunks", {})

    def overtaken(kinds):
        if not first:
            first.append(two_products())
            first[0][0].compile()
        return linked(kinds)

    monkeypatch.setattr(team, "_compiled_thunks", overtaken)
    second = two_products()
    programs = [second[0].compile(), first[0][0].compile()]
    assert len({tuple(thunk for thunk, _ in program._code) for program in programs}) == 1
    for calls, out in (*first, second):
        cpu_calls.run(calls, 1)
        assert not out.isnan().any()


def test_an_interrupt_costs_no_thread():
    """It is raised once the step's machine code returns, and the next step uses the same threads."""
    from runtime.kernels.cpu import sharing

    calls, out = two_products()
    cpu_calls.run(calls, 3)
    expected, before, lead = out.clone(), threading.active_count(), sharing.lead

    def interrupted(words, code, rows):
        lead(words, code, rows)
        raise KeyboardInterrupt

    for _ in range(5):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sharing, "lead", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cpu_calls.run(calls, 3)
    out.fill_(torch.nan)
    cpu_calls.run(calls, 3)
    assert torch.equal(out, expected)
    assert threading.active_count() == before


def test_threads_find_their_program_compiled(monkeypatch):
    """Compiled by them, it would be so beside what the caller does next, whose sys.stdout numba's compiler may undo."""
    from runtime.kernels.cpu import sharing, team

    events, followed = [], threading.Event()
    others = [other._words for other in team._started]  # whose threads may wake up meanwhile

    class Follow:
        def compile(self, kinds):
            events.append(("compiled", threading.current_thread()))

        def __call__(self, words, thread, last_sequence):
            if not any(words is other for other in others):
                events.append(("called", threading.current_thread()))
                followed.set()
            return last_sequence

    monkeypatch.setattr(sharing, "follow", Follow())
    started = team.Team(2)
    assert followed.wait(10)
    started.stop()
    assert events[0] == ("compiled", threading.current_thread())
    assert [event for event, _ in events[1:]] == ["called"] * len(events[1:])


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
    from runtime.kernels.cpu import sharing

    words = np.zeros(sharing.TEAM_WORDS, np.int64)
    words[sharing.THREADS] = threads
    for thread in range(threads):
        words[sharing.thread_word(thread, sharing.PHASE)] = 1
    return sharing, words


@pytest.mark.parametrize("chunks", [1, 2, 5, 64])
def test_a_descheduled_thread_delays_nobody(chunks):
    sharing, words = team(3)
    absent = sharing.claim(words, 1, chunks)  # and is then descheduled
    published = []
    while (chunk := sharing.claim(words, 0, chunks)) >= 0:
        assert sharing.begin_publish(words, 0, chunk)
        sharing.end_publish(words, 0, chunk)
        published.append(chunk)
    assert sorted(published) == list(range(chunks))
    assert not sharing.begin_publish(words, 1, absent), "it would overwrite what later phases read"
    assert sharing.claim(words, 1, chunks) == -1
    while sharing.single(words, 0):
        sharing.end_publish(words, 0, 0)
    assert not sharing.single(words, 1), "it has been done"


def test_a_thread_two_phases_behind_claims_nothing():
    sharing, words = team(2)
    for _ in range(2):
        while (chunk := sharing.claim(words, 0, 6)) >= 0:
            assert sharing.begin_publish(words, 0, chunk)
            sharing.end_publish(words, 0, chunk)
    assert sharing.claim(words, 1, 6) == -1
    assert sharing.claim(words, 1, 6) == -1
    assert sharing.claim(words, 1, 6) >= 0


def test_limits_are_those_of_the_runtime():
    sharing, _ = team(1)
    assert (sharing.MAX_THREADS, sharing.MAX_ROWS) == (MAX_THREADS, MAX_BATCH)
    assert checks.MAX_ROWS == MAX_BATCH
    assert checks.MAX_UNITS_ON_CPU == sharing.MAX_CHUNKS


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

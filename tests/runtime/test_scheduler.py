"""The scheduler beside other threads, and where it is cut short itself: no request is lost, none has its tokens twice,
and nobody waits for what has ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import runtime
from runtime.engine import answer, batch, pending, prefill_work, queue, rows, scheduler, steps, stream
from runtime.engine.scheduler import scheduler_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.newest_only]

STEP = {module.__file__ for module in (batch, pending, prefill_work, queue, rows, scheduler, steps)}
STREAM = {module.__file__ for module in (queue, scheduler, stream)}
PROMPTS = [[2, 9], [2, 10, 30, 31], [2, 11, 40]]
GREEDY = {"ignore_eos": True}


@pytest.fixture(scope="module")
def small(small_pair):
    return small_pair("gemma3", num_hidden_layers=1, layer_types=["full_attention"]).ours


def fresh(model, rows):
    """The same weights with an engine of their own."""
    return dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, max_batch=rows))


@contextlib.contextmanager
def cut_at(points, files):
    """Raises KeyboardInterrupt at some of the lines of files that run inside, counted from 1; gives the list of those
    that have been run."""
    seen = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) in points:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


def first_times(points):
    """The number of the first time at each line, counted from 1."""
    return sorted({line: number for number, line in reversed(list(enumerate(points, 1)))}.values())


def test_answers_beside_one_that_is_cut_short_are_whole(small):
    """At whatever line: they neither get tokens twice nor stop. One ends before the other, which moves to its row."""
    lengths = [2, 7]
    expected = [
        runtime.generate(small, prompt, max_new_tokens=most, **GREEDY).token_ids
        for prompt, most in zip(PROMPTS, lengths, strict=False)
    ]
    whole = fresh(small, 3)

    def run(points):
        model = dataclasses.replace(whole)
        others = [
            runtime.stream(model, prompt, max_new_tokens=most, **GREEDY)
            for prompt, most in zip(PROMPTS, lengths, strict=False)
        ]
        for other in others:
            other.submit()
        with contextlib.suppress(KeyboardInterrupt), cut_at(points, STEP) as seen:
            runtime.generate(model, PROMPTS[2], max_new_tokens=3, **GREEDY)
        return [tuple(piece.token_ids[0] for piece in other) for other in others], seen

    tokens, points = run(())
    assert tokens == expected and len(points) > 100
    for number in first_times(points):
        assert run({number})[0] == expected, points[number - 1]


def test_cut_short_twice(small):
    """The second time while the first is made good."""
    whole = fresh(small, 2)
    expected = runtime.generate(whole, PROMPTS[1], max_new_tokens=7, **GREEDY).token_ids

    def run(points):
        model = dataclasses.replace(whole)
        engine = scheduler_of(model)
        launch = engine._device.launch

        def fails(*arguments):
            launch(*arguments)  # and its tokens are lost
            raise KeyboardInterrupt

        other = runtime.stream(model, PROMPTS[1], max_new_tokens=7, **GREEDY)
        got = [next(other).token_ids[0] for _ in range(3)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine._device, "launch", fails)
            with cut_at(points, STEP) as seen:
                for _ in range(2):
                    with contextlib.suppress(KeyboardInterrupt):
                        engine.step()
                    patch.undo()
        return (*got, *(piece.token_ids[0] for piece in other)), seen

    tokens, points = run(())
    assert tokens == expected and len(points) > 50
    for number in first_times(points):
        assert run({number})[0] == expected, points[number - 1]


def test_a_row_of_somebody_elses_after_a_step_that_was_cut_short(small, monkeypatch):
    """What it has left half done is made good all the same."""
    model = fresh(small, 2)
    expected = runtime.generate(model, PROMPTS[1], max_new_tokens=7, **GREEDY).token_ids
    engine, stream = scheduler_of(model), runtime.stream(model, PROMPTS[1], max_new_tokens=7, **GREEDY)
    got = [next(stream).token_ids[0] for _ in range(3)]

    def fails(*arguments):
        launch(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        launch = engine._device.launch
        patch.setattr(engine._device, "launch", fails)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    with engine.free_row():
        pass
    assert (*got, *(piece.token_ids[0] for piece in stream)) == expected


def test_a_stream_whose_end_is_cut_short_ends_as_it_is_dropped(small):
    def run(points):
        model = fresh(small, 1)
        stream, waits = (runtime.stream(model, prompt, max_new_tokens=30, **GREEDY) for prompt in PROMPTS[:2])
        next(stream)
        (answer,) = stream._answers
        waits.submit()
        with contextlib.suppress(KeyboardInterrupt), cut_at(points, STREAM) as seen:
            stream.close()
        del stream
        next(waits)
        return answer.steps, seen

    steps, points = run(())
    assert steps < 5 and len(points) > 20
    for number, point in enumerate(points, 1):
        assert run({number})[0] < 5, point


def test_a_request_that_is_cut_short_as_it_is_submitted_runs_once(small):
    """If it is read after all; if it is dropped, not at all."""
    whole = fresh(small, 2)
    expected = runtime.generate(whole, PROMPTS[0], max_new_tokens=4, **GREEDY).token_ids

    def run(points, is_read):
        model = dataclasses.replace(whole)
        stream = runtime.stream(model, PROMPTS[0], max_new_tokens=4, **GREEDY)
        (answer,) = stream._answers
        with contextlib.suppress(KeyboardInterrupt), cut_at(points, STREAM) as seen:
            stream.submit()
        if is_read:
            return tuple(piece.token_ids[0] for piece in stream), seen
        del stream
        runtime.generate(model, PROMPTS[1], max_new_tokens=4, **GREEDY)
        return answer.steps, seen

    points = run((), True)[1]
    for number, point in enumerate(points, 1):
        assert run({number}, True)[0] == expected, point
        assert run({number}, False)[0] == 0, point


def test_two_threads_that_count_the_answers_that_are_over(small):
    """The second while the first looks at one: neither takes the next for over."""
    stream = runtime.stream(small, PROMPTS[:2])

    class Over:
        @property
        def is_over(self):
            stream._answers[0] = SimpleNamespace(is_over=True)
            assert not stream._is_complete()
            return True

    stream._answers = [Over(), SimpleNamespace(is_over=False)]
    assert not stream._is_complete()
    stream._answers[1].is_over = True
    assert stream._is_complete()


@pytest.mark.parametrize("way", ["dropped", "late"])
def test_what_nobody_reads_does_not_fill_the_queue(small, way):
    engine = runtime.Engine(fresh(small, 1), max_queue=1)
    stream = engine.submit(PROMPTS[0], timeout=0.01 if way == "late" else None)
    if way == "dropped":
        del stream
    else:
        time.sleep(0.02)
    assert len(list(engine.submit(PROMPTS[1], max_new_tokens=2, **GREEDY))) == 2


def test_a_request_that_comes_as_all_others_end_is_answered(small, monkeypatch):
    model = fresh(small, 1)
    engine, late = scheduler_of(model), runtime.stream(model, PROMPTS[0], max_new_tokens=2, **GREEDY)
    runtime.generate(model, PROMPTS[1], max_new_tokens=2)
    collect = engine._collect
    monkeypatch.setattr(engine, "_collect", lambda: (collect(), late.submit()))
    runtime.Engine(model).close()
    monkeypatch.undo()
    assert engine.waiting == 1
    assert len(list(late)) == 2


def test_two_threads_that_submit_are_both_watched(small, monkeypatch):
    """The second while the first looks at its own request."""
    model, cancel = fresh(small, 2), threading.Event()
    plain = runtime.stream(model, PROMPTS[0], max_new_tokens=30, **GREEDY)
    watched = runtime.stream(model, PROMPTS[1], max_new_tokens=30, cancel=cancel, **GREEDY)
    is_watched = answer.Call.is_watched.fget

    def meanwhile(call):
        if call is plain._call and not engine.waiting > 1:
            thread = threading.Thread(target=watched.submit)
            thread.start()
            thread.join()
        return is_watched(call)

    engine = scheduler_of(model)
    monkeypatch.setattr(answer.Call, "is_watched", property(meanwhile))
    plain.submit()
    cancel.set()
    next(plain)
    assert watched.results[0].finish_reason == "cancelled" and watched.results[0].token_ids == ()


def test_whoever_wants_the_model_alone_comes_between_two_steps(small, monkeypatch):
    """And not once the reader, who takes one step after another, is done."""
    model = fresh(small, 1)
    runtime.generate(model, PROMPTS[0], max_new_tokens=3)
    engine, got, begun = scheduler_of(model), [], threading.Event()
    launch = engine._device.launch

    def slow(*arguments):
        time.sleep(0.002)  # as a kernel that runs, others go on meanwhile
        launch(*arguments)

    def read():
        for piece in runtime.stream(model, PROMPTS[0], max_new_tokens=120, **GREEDY):
            got.append(piece)
            begun.set()

    monkeypatch.setattr(engine._device, "launch", slow)
    reader = threading.Thread(target=read)
    reader.start()
    begun.wait(10)
    with engine.alone():
        count = len(got)
        time.sleep(0.02)
        assert len(got) == count < 120
    reader.join(20)
    assert len(got) == 120


def test_a_childs_waiters_are_its_own(small, monkeypatch):
    """Those of the parent's threads are not woken in their place."""
    turn = scheduler_of(fresh(small, 1)).turn
    with turn.waits(threading.Event()):
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with turn.waits(threading.Event()) as ready:
            assert turn.run(lambda: None)
            turn.wake_next()
            assert ready.is_set()


def test_two_threads_of_a_child_do_not_both_have_the_turn(small, monkeypatch):
    turn, both = scheduler_of(fresh(small, 1)).turn, threading.Barrier(2)
    asked, inside, most = threading.local(), [], []

    def getpid():
        if not vars(asked):
            asked.once = True
            both.wait(10)  # neither has the turn as the other looks
        return -1

    monkeypatch.setattr(os, "getpid", getpid)

    def action():
        inside.append(1)
        time.sleep(0.1)
        most.append(len(inside))
        inside.pop()

    threads = [threading.Thread(target=turn.run, args=(action,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1

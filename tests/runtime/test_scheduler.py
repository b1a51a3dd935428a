"""The scheduler beside other threads, and where it is cut short itself: no request is lost, none has its tokens twice,
and nobody waits for what has ended."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest

import runtime
from runtime.engine import answer
from runtime.engine.scheduler import scheduler_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.newest_only]

PROMPTS = [[2, 9], [2, 10, 30, 31], [2, 11, 40]]
GREEDY = {"ignore_eos": True}


@pytest.fixture(scope="module")
def small(small_pair):
    return small_pair("gemma3", num_hidden_layers=1, layer_types=["full_attention"]).ours


def fresh(model, rows):
    """The same weights with an engine of their own."""
    return dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, max_batch=rows))


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

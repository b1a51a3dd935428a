"""A closed model: its memory is freed, and whoever still uses it is told."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref

import pytest

import runtime
from runtime.engine.scheduler import scheduler_of


def test_the_methods_are_the_functions(tiny):
    options = {"max_new_tokens": 5, "ignore_eos": True}
    messages = [{"role": "user", "content": "the dog"}]
    answer = runtime.generate(tiny, "the dog", **options).token_ids
    assert tiny.generate("the dog", **options).token_ids == answer
    assert tuple(piece.token_ids[0] for piece in tiny.stream("the dog", **options)) == answer
    assert [row.token_ids for row in tiny.generate(["the dog"], **options)] == [answer]
    assert tiny.chat(messages, **options).token_ids == runtime.chat(tiny, messages, **options).token_ids
    assert tiny.inspect("the dog", top_k=2).positions == runtime.inspect(tiny, "the dog", top_k=2).positions


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_leaving_the_block_frees_the_weights_and_the_state(tiny, used):
    with tiny as model:
        if used:
            model.generate("A", max_new_tokens=2)
        held = [weakref.ref(model.weights.embedding), weakref.ref(model.rope)]
        held += [weakref.ref(model.engine.state)] if used else []
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)
    model.close()
    for call in (
        lambda: model.generate("A"),
        lambda: model.stream("A"),
        lambda: model.chat([{"role": "user", "content": "A"}]),
        lambda: model.inspect("A"),
        lambda: model.weights,
        lambda: model.device,
        lambda: model.__enter__(),
    ):
        with pytest.raises(runtime.ModelClosed, match="tiny has been closed: load it again"):
            call()
    assert "closed" in repr(model) and "closed" in model._repr_html_()
    again = pickle.loads(pickle.dumps(model))
    assert again.generate("A", max_new_tokens=2).token_ids


@pytest.mark.parametrize("end", ["read on", "close", "forget"])
def test_an_open_stream_ends_with_its_model(tiny, end):
    expected = tiny.generate("the dog", max_new_tokens=9, ignore_eos=True).token_ids
    with tiny as model:
        pieces = model.stream("the dog", max_new_tokens=9, ignore_eos=True)
        next(pieces)
        weights = weakref.ref(model.weights.embedding)
    gc.collect()
    assert weights() is None, "no step is under way"
    if end == "read on":
        with pytest.raises(runtime.ModelClosed):
            next(pieces)
        assert list(pieces) == []
        assert pieces.results[0].token_ids == expected[:1] and pieces.results[0].finish_reason is None
    elif end == "close":
        pieces.close()
    else:
        del pieces


def test_a_caller_that_waits_for_a_closed_model_is_told(tiny):
    told, waits = [], threading.Event()

    def ask():
        waits.set()
        try:
            tiny.generate("A", max_new_tokens=2)
        except runtime.ModelClosed as error:
            told.append(error)

    with scheduler_of(tiny).alone():
        weights = weakref.ref(tiny.weights.embedding)
        other = threading.Thread(target=ask)
        other.start()
        waits.wait(10)
        other.join(0.1)
        tiny.close()
        assert weights() is not None, "what runs may read the weights"
    other.join(10)
    assert told and not other.is_alive()
    gc.collect()
    assert weights() is None

"""A thread that takes the steps: what it delivers, and how it ends."""

from __future__ import annotations

import threading

import pytest

import runtime
from runtime.engine.driver import Driver
from runtime.engine.scheduler import scheduler_of

pytestmark = pytest.mark.newest_only  # about code of our own


class Readers:
    """Collects deliveries by stream, and waits for the last ones."""

    def __init__(self):
        self.pieces, self.errors, self.ended = {}, {}, {}
        self.batches = []

    def deliver(self, deliveries):
        self.batches.append(len(deliveries))
        for stream, pieces, is_last, error in deliveries:
            self.pieces.setdefault(stream, []).extend(pieces)
            if is_last:
                self.errors[stream] = error
                self.ended.setdefault(stream, threading.Event()).set()

    def wait(self, stream):
        assert self.ended.setdefault(stream, threading.Event()).wait(20)


@pytest.fixture
def readers():
    return Readers()


@pytest.fixture
def driver(tiny, readers):
    driver = Driver(tiny, readers.deliver)
    yield driver
    driver.close()
    assert not driver._thread.is_alive()


def test_streams_that_nobody_reads_are_answered(tiny, driver, readers):
    prompts = ["the dog", "A", "snow", "the", "dogs", "a, b"]
    expected = [runtime.generate(tiny, prompt, max_new_tokens=20 + index) for index, prompt in enumerate(prompts)]
    streams = [runtime.stream(tiny, prompt, max_new_tokens=20 + index) for index, prompt in enumerate(prompts)]
    for stream in streams:
        driver.submit(stream)
    for stream, result in zip(streams, expected, strict=True):
        readers.wait(stream)
        assert tuple(token for piece in readers.pieces[stream] for token in piece.token_ids) == result.token_ids
        assert stream.results[0].finish_reason == result.finish_reason
        assert readers.errors[stream] is None
    assert max(readers.batches) == 4, "one delivery for all rows of a step"


def test_a_stream_that_is_cancelled_ends(tiny, driver, readers):
    stream = runtime.stream(tiny, "the dog", max_new_tokens=100, ignore_eos=True)
    driver.submit(stream)
    stream.cancel()
    readers.wait(stream)
    assert stream.results[0].finish_reason == "cancelled"
    after = runtime.stream(tiny, "the dog", max_new_tokens=3, ignore_eos=True)
    driver.submit(after)
    readers.wait(after)
    assert len(readers.pieces[after]) == 3


def test_an_answer_without_tokens_ends_too(tiny, driver, readers):
    stream = runtime.stream(tiny, "the dog", max_new_tokens=0)
    driver.submit(stream)
    readers.wait(stream)
    assert readers.pieces[stream] == [] and stream.results[0].finish_reason == "length"


def test_an_error_of_one_answer_is_its_own(tiny, driver, readers):
    def fails(ids, logits):
        raise ZeroDivisionError

    wrong = runtime.stream(tiny, "the dog", max_new_tokens=9, logits_processors=[fails])
    right = runtime.stream(tiny, "the dog", max_new_tokens=9, ignore_eos=True)
    for stream in (wrong, right):
        driver.submit(stream)
        readers.wait(stream)
    assert isinstance(readers.errors[wrong], ZeroDivisionError)
    assert readers.errors[right] is None and len(readers.pieces[right]) == 9


def test_a_step_that_fails_ends_all_and_the_next_are_answered(tiny, driver, readers, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no such step")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler_of(tiny)._device, "launch", fails)
        failed = [runtime.stream(tiny, prompt, max_new_tokens=9) for prompt in ("the dog", "A")]
        for stream in failed:
            driver.submit(stream)
        for stream in failed:
            readers.wait(stream)
            assert str(readers.errors[stream]) == "no such step"
    assert "a step failed" in caplog.text
    after = runtime.stream(tiny, "the dog", max_new_tokens=9, ignore_eos=True)
    driver.submit(after)
    readers.wait(after)
    assert len(readers.pieces[after]) == 9


def test_closing_ends_what_is_under_way(tiny, readers):
    driver = Driver(tiny, readers.deliver)
    stream = runtime.stream(tiny, "the dog", max_new_tokens=120, ignore_eos=True)
    driver.submit(stream)
    driver.close()
    readers.wait(stream)
    assert stream.results[0].finish_reason in ("cancelled", "length")
    assert runtime.generate(tiny, "A", max_new_tokens=3, ignore_eos=True).token_ids


def test_a_closed_model_ends_its_streams(tiny, driver, readers):
    stream = runtime.stream(tiny, "the dog", max_new_tokens=120, ignore_eos=True)
    driver.submit(stream)
    tiny.close()
    readers.wait(stream)
    assert isinstance(readers.errors[stream], runtime.ModelClosed) or len(readers.pieces[stream]) == 120
    with pytest.raises(runtime.ModelClosed):
        driver.submit(runtime.stream(tiny, "A"))

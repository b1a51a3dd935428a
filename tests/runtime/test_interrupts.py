"""Whatever is cut short, at whatever point, the next request is answered right."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import runtime
from runtime.engine import (
    answer,
    batch,
    decode,
    drafts,
    graph,
    guess_chunk,
    padded_chunk,
    pending,
    prefill,
    prefill_work,
    prefix_cache,
    queue,
    rows,
    scheduler,
    short_chunk,
    speculation,
    step_cost,
    steps,
    stream,
)
from runtime.families import ring_backup, state
from runtime.families.state import new_state
from runtime.kernels.argmax import NO_KEY
from runtime.kernels.cpu import calls as cpu_calls

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.newest_only]

ERRORS = (KeyboardInterrupt, RecursionError, MemoryError)
# Not turn.py: tracing also stops where its `with` enters and leaves, and there the interpreter handles no signal.
FILES = {
    module.__file__
    for module in (
        *(batch, pending, prefill_work, queue, rows, scheduler, steps),
        *(answer, decode, graph, prefill, prefix_cache, short_chunk, state, stream, cpu_calls),
        importlib.import_module("runtime.generation"),
    )
} | {__file__}
SPECULATION = {module.__file__ for module in (drafts, guess_chunk, speculation, step_cost, ring_backup)}
IN_CALLS = {"__call__", "<dictcomp>", "_argument"}


class Cut(Exception):
    """Stands for whatever was raised."""


def cut_at(point, error, function, files=FILES):
    """Calls a function and raises an error at one of its points, or None at none: each line of the files.

    Returns:
        The points that there were. Where the error came out, Cut is raised in its place, and nothing of it is kept.
    """
    seen = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in files:
            return None
        if event == ("call" if frame.f_code.co_name in IN_CALLS else "line"):
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) == point:
                raise error()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except error:
        raise Cut from None
    finally:
        sys.settrace(before)
    return seen


def every_point(function, prepare, *, last=False, files=FILES):
    """Cuts a call short at each of its lines in turn, the first time that it comes there or the last, each call on
    something freshly prepared, and yields that."""
    uncut = prepare()
    points = cut_at(None, KeyboardInterrupt, lambda: function(uncut), files)
    assert len(points) > 10
    numbered = list(enumerate(points, 1))
    for point in sorted({line: number for number, line in (numbered if last else numbered[::-1])}.values()):
        fresh = prepare()
        try:
            cut_at(point, ERRORS[point % len(ERRORS)], lambda fresh=fresh: function(fresh), files)
        except Cut:
            pass
        gc.collect(0)  # of what the error held
        yield fresh


@pytest.fixture(scope="module")
def small(small_pair):
    return small_pair("gemma3", num_hidden_layers=1, layer_types=["full_attention"]).ours


def prompts_of(rows):
    return [[2, 9 + row, *range(30, 33 + row)] for row in range(rows)]


def answers(model, rows, tokens=3):
    results = runtime.generate(model, prompts_of(rows), max_new_tokens=tokens, ignore_eos=True)
    return [result.token_ids for result in results]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_capture_cut_short_is_made_again(rows, small):
    if missing := cpu_calls.missing(small.dtype):
        pytest.skip(missing)
    whole = dataclasses.replace(small)
    expected = answers(whole, rows)

    state = whole.engine.state.first_rows(rows)

    def prepare():
        state.graphs.clear()
        return state

    for _ in every_point(lambda state: decode.stepper(whole, state), prepare):
        assert answers(whole, rows) == expected


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
def test_a_request_cut_short_leaves_the_model_as_good_as_new(eager, small):
    limits = dataclasses.replace(small.runtime, eager=eager, max_batch=2, prefill_chunk=2)
    whole = dataclasses.replace(small, runtime=limits)
    expected = answers(whole, 2)
    for model in every_point(lambda model: answers(model, 2), lambda: dataclasses.replace(whole), last=eager):
        assert answers(model, 2) == expected


def test_a_speculated_request_cut_short_leaves_the_model_as_good_as_new(small_pair, monkeypatch):
    if missing := cpu_calls.missing(torch.float32):
        pytest.skip(missing)
    monkeypatch.setattr(step_cost.StepCost, "of", lambda cost, rows: 1 + rows / 1e6)  # every guess is checked
    pair = small_pair("gemma3", num_hidden_layers=1, layer_types=["sliding_attention"])
    whole = dataclasses.replace(pair.ours, runtime=dataclasses.replace(pair.ours.runtime, max_batch=1))
    prompt, options = [2, *[7, 8, 9, 10, 7, 8, 11] * 3], {"max_new_tokens": 12, "ignore_eos": True}
    expected = runtime.generate(whole, prompt, **options).token_ids

    def answer(model):
        return runtime.generate(model, prompt, speculate="prompt", **options).token_ids

    def prepare():
        model = dataclasses.replace(whole)
        runtime.generate(model, prompt, max_new_tokens=1)
        return model

    for model in every_point(answer, prepare, files=SPECULATION):
        assert answer(model) == expected


def test_what_a_head_cut_short_leaves_is_cleared(small):
    """On a GPU a plain step launches the head's two kernels separately, and the second clears what the first left."""
    state = new_state(small, 2)
    state.argmax_keys.fill_(7)
    state.reset()
    assert (state.argmax_keys == NO_KEY).all()


@pytest.fixture
def operations(cuda_graphs, monkeypatch):
    """A step and a chunk that raise an error if they are given one."""
    operations = SimpleNamespace(error=None)

    def run(*_):
        if operations.error:
            raise operations.error
        cuda_graphs.run(lambda: ("operations",))

    monkeypatch.setattr(decode, "decode_step", run)
    monkeypatch.setattr(decode, "_warm_up", lambda *_: None)
    monkeypatch.setattr(padded_chunk, "run_padded_chunk", run)
    return operations


def empty():
    return SimpleNamespace(graphs={}, logits=None, batch=1)


@pytest.mark.filterwarnings("error")
def test_a_graph_cut_short_is_captured_again(on_a_gpu, cuda_graphs, operations):
    def step_is_replayed(fresh, count):
        cuda_graphs.ran.clear()
        decode.stepper(on_a_gpu, fresh, count)()
        assert cuda_graphs.ran == [("replayed", "operations")] * count

    def chunk_is_replayed(fresh):
        padded_chunk._run(on_a_gpu, fresh, 128, 0, samples=False)
        cuda_graphs.ran.clear()
        padded_chunk._run(on_a_gpu, fresh, 128, 0, samples=False)
        assert cuda_graphs.ran == [("replayed", "operations")]

    for count in (1, 8):
        for fresh in every_point(lambda fresh, count=count: decode.stepper(on_a_gpu, fresh, count), empty):
            step_is_replayed(fresh, count)
    for fresh in every_point(lambda fresh: padded_chunk._run(on_a_gpu, fresh, 128, 0, samples=False), empty):
        chunk_is_replayed(fresh)

    for error in ERRORS:
        fresh, operations.error = empty(), error
        with pytest.raises(error):
            decode.stepper(on_a_gpu, fresh, 4)
        with pytest.raises(error):
            padded_chunk._run(on_a_gpu, fresh, 128, 0, samples=False)
        operations.error = None
        step_is_replayed(fresh, 4)
        chunk_is_replayed(fresh)

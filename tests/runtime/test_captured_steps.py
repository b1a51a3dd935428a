"""Captured steps on a GPU: which graphs there are, and what a failed capture leaves. tests/runtime/test_rows.py has the
loop around them."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace

import pytest

from runtime.engine import decode
from runtime.engine.decode import rows_of_step, stepper


@pytest.fixture(autouse=True)
def steps_that_report(cuda_graphs, monkeypatch):
    monkeypatch.setattr(
        decode, "decode_step", lambda ops, model, state, samples: cuda_graphs.run(lambda: ("step", state.batch))
    )
    monkeypatch.setattr(
        decode, "_warm_up", lambda ops, model, state, samples: cuda_graphs.run(lambda: ("warm-up", state.batch))
    )


def test_graphs_are_captured_once_and_share_a_pool(on_a_gpu, cuda_graphs):
    """Those of a state and of the views of its first rows."""
    whole = SimpleNamespace(graphs={}, logits=None, batch=8)
    states = [whole, SimpleNamespace(graphs=whole.graphs, logits=None, batch=4)]
    expected = []
    for first in (True, False):
        for state in states:
            for steps in (1, 8):
                stepper(on_a_gpu, state, steps)()
                expected += [("plainly", "warm-up", state.batch)] * first
                expected += [("replayed", "step", state.batch)] * steps
    assert cuda_graphs.ran == expected
    assert [len(graph.operations) for graph in cuda_graphs.captures] == [1, 8, 1, 8]
    assert len({id(graph.memory) for graph in cuda_graphs.captures}) == 1


def test_a_failed_capture_is_one_warning_and_the_plain_step(on_a_gpu, cuda_graphs):
    cuda_graphs.fails = True
    state = SimpleNamespace(graphs={}, logits=None, batch=1)
    with pytest.warns(UserWarning, match="decoding without a CUDA graph, since its capture failed: operation not perm"):
        stepper(on_a_gpu, state, 4)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (4, 1):
            stepper(on_a_gpu, state, steps)()
    assert cuda_graphs.ran[1:] == [("plainly", "step", 1)] * 9 and len(cuda_graphs.captures) == 1


def test_an_eager_model_takes_plain_steps_of_just_its_rows(on_a_gpu, cuda_graphs):
    assert [rows_of_step(on_a_gpu, batch) for batch in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    on_a_gpu.runtime = dataclasses.replace(on_a_gpu.runtime, max_batch=6)
    assert [rows_of_step(on_a_gpu, batch) for batch in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    on_a_gpu.runtime = dataclasses.replace(on_a_gpu.runtime, eager=True)
    assert [rows_of_step(on_a_gpu, batch) for batch in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    stepper(on_a_gpu, SimpleNamespace(graphs={}, logits=None, batch=3), 3)()
    assert cuda_graphs.ran == [("plainly", "step", 3)] * 3 and cuda_graphs.captures == []

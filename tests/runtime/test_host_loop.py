"""The host's loop on a GPU, driven by a device of the test's own that is honest about order: a launch returns at once,
and nothing of a step can be seen before the device has come to it."""

from __future__ import annotations

import warnings
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import decode
from runtime.engine.decode import HOST_LAG, rows_of_step, stepper, tokens_behind
from runtime.families.state import EMITTED_RING, MAX_STOP_IDS
from runtime.kernels.advance import advance_reference

PAD = 0
VOCAB = 40


class State:
    """What of a decode state the loop and `advance` use."""

    def __init__(self, rows, stop_ids, steps_before):
        self.token = torch.zeros(rows, dtype=torch.int64)
        self.x = torch.zeros(rows, 1)
        self.position = torch.zeros(rows, dtype=torch.int32)
        self.done = torch.zeros(rows, dtype=torch.bool)
        self.emitted = torch.full((EMITTED_RING, rows), -7)
        self.step = torch.tensor([steps_before])
        self.stop_ids = torch.tensor([*stop_ids, *[-1] * (MAX_STOP_IDS - len(stop_ids))])


class Device:
    """Runs queued work only when the host waits for it, or when `eagerness` says so after a launch."""

    def __init__(self, state, script, eagerness=(), fails_at=None):
        self.state, self.script, self.eagerness = state, script, deque(eagerness)
        self.queue, self.launched, self.waiting, self.most_waiting = deque(), [], deque(), 0
        self.fails_at, self.steps_launched, self.first = fails_at, 0, int(state.step)

    def launch(self, count):
        if self.fails_at is not None and self.fails_at < self.steps_launched + count:
            raise RuntimeError("the device has failed")
        self.launched.append(count)
        for _ in range(count):
            self.queue.append(self._step)
        self.steps_launched += count
        for _ in range(min(self.eagerness.popleft() if self.eagerness else 0, len(self.queue))):
            self.queue.popleft()()

    def _step(self):
        state = self.state
        # The script says what the model would pick; a row that is done goes on picking, and must not be heard.
        state.token.copy_(torch.tensor(self.script[int(state.step) - self.first]))
        table = torch.zeros(VOCAB, 1)
        names = ("token", "x", "position", "done", "emitted", "step")
        advance_reference(*(getattr(state, name) for name in names), table, state.stop_ids, embed_scale=1.0, pad=PAD)

    def request(self, first, count):
        copied = []
        slots = [(first + step) % EMITTED_RING for step in range(count)]
        self.queue.append(lambda: copied.extend(self.state.emitted[slots].tolist()))
        self.waiting.append(copied)
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def take(self):
        copied = self.waiting.popleft()
        while not copied:
            self.queue.popleft()()
        return copied


def device_for(script, stop_ids, steps_before=0, **options):
    state = State(len(script[0]), stop_ids, steps_before)
    return state, Device(state, script, **options)


def run(script, stop_ids, max_new, *, steps=1, ahead=HOST_LAG, **options):
    state, device = device_for(script, stop_ids, **options)
    loop = tokens_behind(state, device.launch, device, max_new, steps=steps, ahead=ahead)
    return list(loop), device


def expected(script, stop_ids, max_new):
    """What the plain loop gives: step, look, go on."""
    rows, done = [], [False] * len(script[0])
    for step in script[:max_new]:
        if all(done):
            break
        rows.append([PAD if was else token for was, token in zip(done, step, strict=True)])
        done = [was or token in stop_ids for was, token in zip(done, rows[-1], strict=True)]
    return rows


requests = st.integers(1, 8).flatmap(
    lambda rows: st.tuples(
        st.lists(st.lists(st.integers(1, VOCAB - 1), min_size=rows, max_size=rows), min_size=90, max_size=90),
        st.sets(st.integers(1, VOCAB - 1), max_size=4),
        st.integers(0, 90),
        st.sampled_from([1, 4, 8]),
        st.integers(1, HOST_LAG),
        st.integers(0, 200),
        st.lists(st.integers(0, 20), max_size=90),
    )
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(requests)
def test_tokens_are_those_of_the_plain_loop(request):
    script, stop_ids, max_new, steps, ahead, before, eagerness = request
    # The ring must hold all that the device may have emitted before the host has read it.
    assert (ahead + 1) * steps <= EMITTED_RING
    rows, device = run(script, stop_ids, max_new, steps=steps, ahead=ahead, steps_before=before, eagerness=eagerness)
    assert rows == expected(script, stop_ids, max_new)
    assert device.steps_launched <= max_new, "the cache may have no room for another step"
    assert set(device.launched) <= {1, steps}
    assert device.most_waiting <= ahead + 1


def script_of(*rows):
    return [list(step) for step in zip(*rows, strict=True)]


def test_the_device_is_kept_ahead_of_the_host():
    script = script_of([5] * 40)
    state, device = device_for(script, [])
    loop = tokens_behind(state, device.launch, device, 40)
    next(loop)
    assert device.steps_launched == HOST_LAG + 1
    next(loop)
    assert device.steps_launched == HOST_LAG + 2
    assert len(device.queue) > 0, "the device still has work when the host has its token"


def test_a_stop_token_inside_a_graph_of_eight_steps_ends_the_run_there():
    script = script_of([5, 6, 7, 8, 9, 9, 9, 9] * 3)
    rows, _ = run(script, [7], 24, steps=8, ahead=1)
    assert rows == [[5], [6], [7]]


def test_rows_that_stop_at_different_steps_pad():
    script = script_of([5, 7, 5, 5, 5, 5, 5, 5], [6, 6, 6, 6, 6, 7, 6, 6])
    assert run(script, [7], 8, steps=4, ahead=1)[0] == [[5, 6], [7, 6], [PAD, 6], [PAD, 6], [PAD, 6], [PAD, 7]]


def test_a_loop_closed_early_leaves_the_device_to_finish_in_order():
    script = script_of(list(range(1, 31)))
    state, device = device_for(script, [])
    loop = tokens_behind(state, device.launch, device, 30)
    assert [next(loop) for _ in range(3)] == [[1], [2], [3]]
    loop.close()
    launched = device.steps_launched
    while device.queue:
        device.queue.popleft()()
    assert state.step.item() == launched == 3 + HOST_LAG


@pytest.mark.parametrize("fails_at", range(10))
def test_what_came_before_a_failure_has_been_handed_out_or_is_lost_with_it(fails_at):
    script = script_of(list(range(1, 31)))
    state, device = device_for(script, [], fails_at=fails_at)
    handed = []
    with pytest.raises(RuntimeError, match="the device has failed"):
        for row in tokens_behind(state, device.launch, device, 30):
            handed.append(row[0])
    assert handed == list(range(1, max(0, fails_at - HOST_LAG) + 1))


def test_a_token_cannot_be_read_before_its_step():
    """The device of these tests would notice a loop that reads too early."""
    state, device = device_for(script_of([5] * 10), [])
    device.request(0, 1)
    device.launch(1)
    assert device.take() == [[-7]], "asked for before the launch, it is what was there before"


@pytest.fixture(autouse=True)
def steps_that_report(cuda_graphs, monkeypatch):
    monkeypatch.setattr(decode, "decode_step", lambda model, state: cuda_graphs.run(lambda: ("step", state.batch)))
    monkeypatch.setattr(decode, "_warm_up", lambda model, state: cuda_graphs.run(lambda: ("warm-up", state.batch)))


def test_graphs_are_captured_once_and_share_a_pool(on_a_gpu, cuda_graphs):
    """Those of a state and of the views of its first rows."""
    whole = SimpleNamespace(graphs={}, batch=8)
    states = [whole, SimpleNamespace(graphs=whole.graphs, batch=4)]
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
    state = SimpleNamespace(graphs={}, batch=1)
    with pytest.warns(UserWarning, match="decoding without a CUDA graph, since its capture failed: operation not perm"):
        stepper(on_a_gpu, state, 4)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (4, 1):
            stepper(on_a_gpu, state, steps)()
    assert cuda_graphs.ran[1:] == [("plainly", "step", 1)] * 9 and len(cuda_graphs.captures) == 1


def test_an_eager_model_takes_plain_steps_of_just_its_rows(on_a_gpu, cuda_graphs):
    assert [rows_of_step(on_a_gpu, batch) for batch in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    on_a_gpu.runtime.max_batch = 6
    assert [rows_of_step(on_a_gpu, batch) for batch in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    on_a_gpu.runtime.eager = True
    assert [rows_of_step(on_a_gpu, batch) for batch in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    stepper(on_a_gpu, SimpleNamespace(graphs={}, batch=3), 3)()
    assert cuda_graphs.ran == [("plainly", "step", 3)] * 3 and cuda_graphs.captures == []

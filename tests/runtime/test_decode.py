"""The decode loop: the same operations at every step, stop tokens, the ring of emitted tokens, state reuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.engine.decode import decode_step, stepper, tokens
from runtime.engine.graph import CapturedGraph
from runtime.engine.guess_step import GuessStep
from runtime.engine.prefill import prefill
from runtime.families.state import EMITTED_RING, MAX_STOP_IDS, new_state
from runtime.kernels.ops import TorchOps

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["gemma", "gemma2", "gemma3"]
WINDOW = 16
# What operations of a step of guesses find at the same addresses every time.
OF_GUESSES = {
    *("out", "x", "branch", "residual", "residual_out", "k_cache", "v_cache", "qkv", "position", "row"),
    *("new_keys", "new_values", "cache", "new", "buffers", "token", "argmax_keys"),
}


def described(value: Any) -> Any:
    """What must not change between steps: a tensor's place and form, a scalar's value."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.storage_offset()
    if isinstance(value, (tuple, list)):
        return tuple(described(item) for item in value)
    return value


class OperationsOutside(TorchDispatchMode):
    """Counts what torch does between the operations of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.seen = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside:
            self.seen.append((str(func), described(args)))
        return func(*args, **(kwargs or {}))


class WatchedOps(TorchOps):
    """Plain PyTorch that keeps what it is asked for."""

    def __init__(self, watch: OperationsOutside) -> None:
        self.watch, self.operations = watch, []

    def run(self, operation):
        self.operations.append((operation.name, {name: described(value) for name, value in vars(operation).items()}))
        self.watch.inside = True
        super().run(operation)
        self.watch.inside = False


def recorded_step(model, state, ops=WatchedOps):
    """Takes one decode step and returns its operations and what is done outside of them."""
    watch = OperationsOutside()
    watched = ops(watch)
    with watch:
        decode_step(watched, model, state)
    return watched.operations, watch.seen


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_makes_the_same_operations(family, batch, small_pair, random_ids):
    """Same order, shapes, strides, addresses and scalars, also where a window fills up and wraps around, and nothing
    outside the operations: what a CUDA graph needs."""
    model = small_pair(family).ours
    state = new_state(model, batch)
    for row in range(batch):
        prefill(model, state, row, random_ids(WINDOW - 3 + row, seed=row))
    first, outside = recorded_step(model, state)
    assert outside == []
    assert len(first) == 5 * len(model.config.layers) + 2
    for _ in range(2 * WINDOW):
        assert recorded_step(model, state) == (first, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_of_guesses_makes_the_same_operations(family, small_pair, random_ids):
    """However many are right or are padding; what tensors operations make besides may be elsewhere, but nothing is read
    back."""
    model = small_pair(family).ours
    state = new_state(model, 4)
    prefill(model, state, 0, random_ids(WINDOW - 3))
    guesses, expected = GuessStep(model, state, 4), None
    for given in ([2, 7, 7, 7], [4, 7, 7, 7], [4, *random_ids(3)], [3, 5, 9, 9]):
        guesses._given.copy_(torch.tensor(given))
        watch = OperationsOutside()
        ops = WatchedOps(watch)
        with watch:
            guesses.take(ops, model, 4)
        places = [[operation[name] for name in OF_GUESSES & operation.keys()] for _, operation in ops.operations]
        made = (
            [(name, places) for (name, _), places in zip(ops.operations, places, strict=True)],
            [name for name, _ in watch.seen],
        )
        assert expected in (None, made) and not any("_local_scalar_dense" in name for name in made[1])
        expected = made
    assert len(made[0]) == 5 * len(model.config.layers) + 2


def test_a_step_that_allocates_outside_is_noticed(small_pair, random_ids):
    model = small_pair("gemma3").ours
    state = new_state(model, 1)
    prefill(model, state, 0, random_ids(3))

    class Careless(WatchedOps):
        def advance(self, token, *rest, **more):
            super().advance(token.clone(), *rest, **more)

    one, another = (recorded_step(model, state, Careless) for _ in range(2))
    assert one[1] != []
    assert one != another or one[0][-1][1]["token"] != described(state.token)


def test_rows_stop_on_their_own(small_pair, random_ids):
    """A row that emits a stop token pads from then on and keeps its position; the loop ends with the last row."""
    pair = small_pair("gemma3")
    model, prompts = pair.ours, [random_ids(5, seed=1), random_ids(9, seed=2)]
    free = [pair.greedy(ids, 30)[0] for ids in prompts]
    stops = (free[0][4], next(token for token in free[1][9:] if token not in free[0][:4] + free[1][:9]))
    expected = []
    for row in free:
        end = next(i for i, token in enumerate(row) if token in stops)
        expected.append(row[: end + 1])
    longest = max(len(row) for row in expected)
    assert len(expected[0]) != len(expected[1])

    state = new_state(model, 2, stop_ids=stops)
    first = [int(prefill(model, state, row, ids)) for row, ids in enumerate(prompts)]
    steps = [first, *tokens(stepper(model, state), state, 100)]
    assert len(steps) == longest
    for row, want in enumerate(expected):
        got = [step[row] for step in steps]
        assert got == want + [model.config.pad_token_id] * (longest - len(want))
        assert state.position[row] == len(prompts[row]) + len(want) - 1
    assert state.done.all()


def test_a_first_token_that_stops_ends_the_run_at_once(small_pair, random_ids):
    pair = small_pair("gemma")
    ids = random_ids(6)
    state = new_state(pair.ours, 1, stop_ids=[pair.greedy(ids, 1)[0][0]])
    prefill(pair.ours, state, 0, ids)
    assert list(tokens(stepper(pair.ours, state), state, 20)) == []


def test_emitted_tokens_stay_in_the_ring(small_pair, random_ids):
    model = small_pair("gemma3").ours
    state = new_state(model, 2)
    for row in range(2):
        prefill(model, state, row, random_ids(4, seed=row))
    count = EMITTED_RING + 9
    steps = list(tokens(stepper(model, state), state, count))
    assert state.step.tolist() == [count] * state.batch
    for step in range(count - EMITTED_RING, count):
        assert state.emitted[step % EMITTED_RING].tolist() == steps[step]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_rows_of_a_state_are_a_state(family, small_pair, random_ids):
    """Its buffers are those of the whole; rows without a prompt have no effect, whatever they hold."""
    model = small_pair(family).ours
    prompts = [random_ids(WINDOW - 3 + row, seed=row) for row in range(3)]
    expected = []
    for ids in prompts:
        alone = new_state(model, 1)
        expected.append(
            [int(prefill(model, alone, 0, ids)), *(row[0] for row in tokens(stepper(model, alone), alone, 30))]
        )
    whole = new_state(model, 8)
    assert whole.first_rows(8) is whole
    for rows in (4, 8, 4):
        state = whole.first_rows(rows)
        state.reset()
        state.done[3:] = True
        assert state.batch == rows and state.cache.keys[0].data_ptr() == whole.cache.keys[0].data_ptr()
        first = [int(prefill(model, state, row, ids)) for row, ids in enumerate(prompts)]
        steps = [first, *(row[:3] for row in tokens(stepper(model, state), state, 30))]
        assert [list(row) for row in zip(*steps, strict=True)] == expected
        assert (
            state.emitted.is_contiguous()
            and whole.first_rows(rows).emitted is state.emitted
            and state.done.tolist() == [False] * 3 + [True] * (rows - 3)
        )
    assert recorded_step(model, state) == recorded_step(model, state)
    graphs = [graph for graph in whole.graphs.values() if isinstance(graph, CapturedGraph)]
    buffers = [len(graph.pool) for graph in graphs]
    stepper(model, whole.first_rows(2))
    assert all(graph.pool is graphs[0].pool for graph in graphs), "steps of any number of rows share their scratch"
    assert [len(graph.pool) for graph in graphs] == buffers, "and another number needs no more"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_used_state_gives_what_a_fresh_one_gives(family, small_pair, random_ids):
    """Also after a longer sequence, and with huge values left all over the cache."""
    model, ids = small_pair(family, torch.bfloat16).ours, random_ids(11, seed=3)

    def run(state):
        picked = [int(prefill(model, state, 0, ids)), *(row[0] for row in tokens(stepper(model, state), state, 39))]
        return picked, state.logits.clone()

    expected, expected_logits = run(new_state(model, 1, with_logits=True))
    state = new_state(model, 1, with_logits=True)
    prefill(model, state, 0, random_ids(70, seed=4))
    list(tokens(stepper(model, state), state, 30))
    for buffer in (*state.cache.keys, *state.cache.values):
        buffer.fill_(1e4)
    state.reset()
    got, logits = run(state)
    assert got == expected
    assert torch.equal(logits, expected_logits)


def test_a_sequence_may_fill_max_seq_len_and_no_more(small_pair, random_ids):
    model = small_pair("gemma2").ours
    state = new_state(model, 1)
    prefill(model, state, 0, random_ids(250))
    assert len(list(tokens(stepper(model, state), state, 9))) == 6
    assert state.position.item() == 256 and state.done.item()


def test_sliding_layers_hold_their_window_and_no_more(small_pair):
    model = small_pair("gemma3").ours
    cache = new_state(model, 3).cache
    assert [keys.shape for keys in cache.keys] == [
        (3, 2, 256 if layer.window is None else WINDOW, 24) for layer in model.config.layers
    ]


def test_bad_arguments_are_refused(small_pair):
    model = small_pair("gemma").ours
    for batch in (0, 9):
        with pytest.raises(ValueError, match=f"1 to 8 .* got {batch}"):
            new_state(model, batch)
    with pytest.raises(ValueError, match=f"at most {MAX_STOP_IDS} ids, got {MAX_STOP_IDS + 1}"):
        new_state(model, 1, stop_ids=range(MAX_STOP_IDS + 1))

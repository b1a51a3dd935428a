"""Chunks of earlier prompts in place of running them again: not a bit changes, whatever was kept and whatever had to
make room."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.engine.decode import decode_step
from runtime.engine.graph import ops_of
from runtime.engine.prefill import Prefill
from runtime.engine.prefix_cache import PrefixCache
from runtime.families.state import DecodeState, new_state
from runtime.model import config
from runtime.model.memory_plan import plan

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 16
ROWS = 3
exact = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def model_of(pair, chunk: int, kept: int):
    """The model with chunks of this length, `kept` of which have room."""
    limits = dataclasses.replace(pair.ours.runtime, prefill_chunk=chunk, prefix_cache_tokens=kept * chunk)
    return dataclasses.replace(pair.ours, runtime=limits, plan=plan(pair.ours.config, limits))


def state_of(model, rows: int) -> DecodeState:
    """A state whose every cache slot is NaN-poisoned."""
    state = new_state(model, rows, with_logits=True)
    for buffer in (*state.cache.keys, *state.cache.values):
        buffer.fill_(torch.nan)
    return state


def run(prompt: Prefill) -> None:
    while not prompt.is_done:
        prompt.advance()


def bits(state: DecodeState, row: int) -> list[torch.Tensor]:
    """All that a step of a row reads, bit for bit."""
    tensors = [state.token, state.position, state.done, state.x, state.logits]
    copies = [tensor[row].nan_to_num(7.0) if tensor.is_floating_point() else tensor[row] for tensor in tensors]
    return copies + [buffer[row].nan_to_num(7.0) for buffer in (*state.cache.keys, *state.cache.values)]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Prompts as (which earlier one they begin like, how much of it they share, tokens of their own, row).
PROMPTS = st.lists(
    st.tuples(
        st.integers(0, 5), st.integers(0, 60), st.lists(st.integers(3, 6), max_size=25), st.integers(0, ROWS - 1)
    ),
    min_size=2,
    max_size=7,
)


@pytest.mark.newest_only  # about which chunks are kept; that chunks have the same bits is shown with the oldest too
@pytest.mark.parametrize("in_buckets", [False, True], ids=["unpadded", "in buckets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@exact
@given(PROMPTS, st.sampled_from([3, 5, 8, 16]), st.sampled_from([2, 3, 64]), st.integers(1, 6))
def test_reuse_changes_no_bit(small_pair, family, dtype, in_buckets, prompts, chunk, tail, kept):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "TAIL_CHUNK", tail)
        reuse_changes_no_bit(model_of(small_pair(family, dtype), chunk, kept), in_buckets, prompts, chunk)


def reuse_changes_no_bit(model, in_buckets, prompts, chunk):
    room, tail = model.plan.prefix_cache // sum(model.plan.kv_row_bytes), model.runtime.tail_chunk
    cache, state = PrefixCache(model), state_of(model, ROWS)
    before: list[list[int]] = [[]]
    for which, shared, own, row in prompts:
        ids = before[which % len(before)][:shared] + own or [3]
        before.append(ids)
        for buffer in (*state.cache.keys, *state.cache.values):
            buffer[row] = torch.nan
        expected = cache.match(ids)
        prompt = Prefill(model, state.first_rows(row + 1), row, ids, cache=cache, in_buckets=in_buckets)
        assert prompt.cached_tokens == expected < len(ids)
        run(prompt)
        whole = len(ids) // chunk * chunk
        places = -(-chunk // tail)
        assert cache.match([*ids, 3]) >= min(whole, room // (places * tail) * chunk), "what has just been run is kept"

        alone = state_of(model, 1)
        run(Prefill(model, alone, 0, ids, in_buckets=in_buckets))
        assert_same(bits(state, row), bits(alone, 0))
        for _ in range(2):
            for each in (state, alone):
                decode_step(ops_of(model), model, each)
            assert_same(bits(state, row), bits(alone, 0))


def test_decoded_tokens_are_run_again(small_pair, random_ids):
    """A step's keys are summed in another order than a chunk's: a second turn reuses the first prompt alone."""
    model = model_of(small_pair("gemma3"), 8, 9)
    cache, state = PrefixCache(model), new_state(model, 1)
    ids = random_ids(30)
    run(Prefill(model, state, 0, ids, cache=cache))
    for _ in range(20):
        ids.append(int(state.token))
        decode_step(ops_of(model), model, state)
    assert cache.match(ids) == 24
    prompt = Prefill(model, state, 0, ids, cache=cache)
    assert (prompt.cached_tokens, prompt.next_tokens, prompt.is_done) == (24, 8, False)
    run(prompt)
    assert cache.match([*ids, 3]) == 48


def test_the_least_recently_used_chunk_makes_room_and_never_one_that_others_follow(small_pair, random_ids):
    model = model_of(small_pair("gemma"), 4, 4)
    cache, state = PrefixCache(model), new_state(model, 1)
    one, two, long, *others = (random_ids(length, seed=length) for length in (9, 10, 30, 5, 6, 7))
    for ids in (one, two, one):
        run(Prefill(model, state, 0, ids, cache=cache))
    left = []
    for ids in others:
        run(Prefill(model, state, 0, ids, cache=cache))
        left.append([cache.match(ids) for ids in (one, two)])
    assert left == [[8, 4], [8, 0], [4, 0]]
    run(Prefill(model, state, 0, long, cache=cache))
    assert [cache.match(ids) for ids in (one, two, *others, long)] == [0] * 5 + [16], "its beginning fills the pool"
    assert repr(cache) == "PrefixCache(4 chunks in 4 of 4 places of 4 tokens)"


def test_equal_chunks_after_different_ones_are_different(small_pair):
    model = model_of(small_pair("gemma"), 2, 8)
    cache, state = PrefixCache(model), new_state(model, 1)
    run(Prefill(model, state, 0, [3, 4, 5, 6, 7], cache=cache))
    assert [cache.match(ids) for ids in ([3, 4, 5, 6, 9], [5, 6, 7], [9, 4, 5, 6, 7], [3, 4])] == [4, 0, 0, 0]


def test_a_prompt_whose_residuals_are_asked_for_is_run_in_full(small_pair, random_ids):
    model, ids = model_of(small_pair("gemma"), 4, 4), random_ids(10)
    cache, state = PrefixCache(model), new_state(model, 1)
    run(Prefill(model, state, 0, ids, cache=cache))
    hidden = torch.full((10, 84), torch.nan)
    prompt = Prefill(model, state, 0, ids, cache=cache, hidden_out=hidden)
    run(prompt)
    assert prompt.cached_tokens == 0 and hidden.isfinite().all()


@pytest.mark.parametrize(
    ("chunk", "tokens", "kept"),
    [(8, 0, 0), (8, 7, 0), (8, 23, 2), (8, None, 32), (WINDOW, None, 16), (WINDOW + 1, None, 0)],
    ids=["off", "no room", "whole chunks", "default", "a whole ring", "longer than a ring"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_plan_counts_the_pool(small_pair, random_ids, dtype, chunk, tokens, kept):
    pair = small_pair("gemma3", dtype)
    limits = dataclasses.replace(pair.ours.runtime, prefill_chunk=chunk, prefix_cache_tokens=tokens)
    model = dataclasses.replace(pair.ours, runtime=limits, plan=plan(pair.ours.config, limits))
    cache, state, ids = PrefixCache(model), new_state(model, 1), random_ids(40)
    assert model.plan.prefix_cache == sum(pool.nbytes for pool in (*cache._keys, *cache._values))
    assert all(len(pool) == kept for pool in cache._keys)
    run(Prefill(model, state, 0, ids, cache=cache))
    assert cache.match(ids) == min(kept, (len(ids) - 1) // chunk) * chunk


@pytest.mark.parametrize(("tokens", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_bad_size_is_refused(small_pair, tokens, error):
    with pytest.raises(error, match="prefix_cache_tokens must be"):
        dataclasses.replace(small_pair("gemma").ours.runtime, prefix_cache_tokens=tokens)

"""Prefill: what it leaves in the state, hidden states and logits at every position, and bad prompts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.engine.decode import decode_step
from runtime.engine.graph import ops_of
from runtime.engine.prefill import READING_WORK, Prefill, logits, prefill
from runtime.families import chunk as chunk_module
from runtime.families.chunk import Chunk
from runtime.families.state import DecodeState, new_state
from runtime.kernels import linear
from runtime.kernels.launch import INTERPRETING
from runtime.model.rope import RopeTables
from runtime.parity.quick import quick_audit

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["gemma", "gemma2", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_every_position_equal_hugging_face(family, small_pair, random_ids):
    """Hugging Face multiplies all positions at once, so the last bits may differ; the choices may not."""
    pair, ids = small_pair(family), random_ids(45)
    hidden = torch.full((45, 84), torch.nan)
    state = new_state(pair.ours, 1, with_logits=True)
    prefill(pair.ours, state, 0, ids, hidden_out=hidden)
    ours = logits(pair.ours, hidden)
    with torch.no_grad():
        expected = pair.hf(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(ours[-1:], state.logits, atol=1e-5, rtol=1e-5)  # by the decode step's head
    assert logits(pair.ours, hidden[:0]).shape == (0, 499)


@pytest.mark.skipif(INTERPRETING, reason="about PyTorch's products")
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
@pytest.mark.parametrize("lacks", [False, True], ids=["has bf16", "lacks bf16"])
def test_bf16_is_multiplied_in_fp32_where_the_processor_lacks_it(lacks, eager, small_pair, random_ids, monkeypatch):
    """Unless the model is eager, whose operations are Hugging Face's own."""
    model, multiplied = small_pair("gemma3", torch.bfloat16).ours, []
    model = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=eager))

    def watched(x, weight):
        multiplied.append(weight)
        return linear.linear_in_fp32(x, weight)

    monkeypatch.setattr(chunk_module, "has_products", lambda dtype: dtype == torch.float32 or not lacks)
    monkeypatch.setattr(chunk_module, "linear_in_fp32", watched)
    prefill(model, new_state(model, 1), 0, random_ids(45))
    assert bool(multiplied) == (lacks and not eager)
    assert quick_audit(model, prompts=2, tokens=8).passed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 6, 16, 17])
def test_chunks_leave_the_same_state(family, chunk, small_pair, random_ids):
    """All that a decode step reads, up to summation order."""
    pair, ids = small_pair(family), random_ids(45)
    states = []
    for pair_of_size in (pair, pair.in_chunks(chunk)):
        state = new_state(pair_of_size.ours, 2)
        token = prefill(pair_of_size.ours, state, 1, ids)
        assert token.data_ptr() == state.token[1:].data_ptr()
        states.append(state)
    whole, cut = states
    for name in ("token", "position", "done", "x"):
        assert torch.equal(getattr(whole, name), getattr(cut, name)), name
    for one, other in zip(whole.cache.keys + whole.cache.values, cut.cache.keys + cut.cache.values, strict=True):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gemma", "gemma3"])
def test_query_heads_that_run_as_queries_of_one_compute_the_same(family, dtype, small_pair, random_ids):
    """Which they do depends on the number of threads."""
    window = {} if family == "gemma" else {"sliding_window": 512}
    model = small_pair(family, dtype, max_position_embeddings=2048, **window).ours
    found, is_folded = [], []
    for threads in (1, 3):
        limits = dataclasses.replace(model.runtime, max_seq_len=1200, threads=threads)
        other = dataclasses.replace(model, runtime=limits, rope=RopeTables(model.config, limits))
        state, length = new_state(other, 1), 1024 + 100
        hidden = torch.full((length, 84), torch.nan, dtype=dtype)
        prefill(other, state, 0, random_ids(length), hidden_out=hidden)
        found.append(hidden)
        chunk = Chunk(other, state.cache, 0, 512, 512)
        masks = [
            chunk._mask(layer, keys.shape[2]) for layer, keys in zip(model.config.layers, chunk.cache.keys, strict=True)
        ]
        is_folded.append(any(mask is not None and mask.shape[2] > 512 for mask in masks))
    assert is_folded == [True, False]
    one, other = (hidden.double() for hidden in found)
    assert (one - other).abs().max() <= {torch.float32: 1e-4, torch.bfloat16: 2**-6}[dtype] * one.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_tokens_that_attend_in_blocks_compute_the_same(kv_heads, dtype, small_pair, random_ids, monkeypatch):
    """Past the window, to the keys of each block's windows alone; nothing but the order of sums depends on it."""
    pair = small_pair("gemma3", dtype, num_key_value_heads=kv_heads, num_attention_heads=4, sliding_window=40)
    model, ids = pair.in_chunks(64).ours, random_ids(253)
    honest, blocks, found = Chunk._blocks, [], []

    def counted(chunk, *given):
        blocks.append(honest(chunk, *given))
        return blocks[-1]

    monkeypatch.setattr(Chunk, "_blocks", counted)
    for size in (16, 32, 1024):
        monkeypatch.setattr("runtime.families.chunk.SLIDING_BLOCK", size)
        blocks.clear()
        state, hidden = new_rows(model, 2), torch.full((len(ids), model.config.hidden), torch.nan, dtype=dtype)
        prefill(model, state, 1, ids, hidden_out=hidden)
        assert set(blocks) == {1, max(1, 64 // size)}
        found.append((hidden, *(cache[1] for cache in (*state.cache.keys, *state.cache.values))))
        eager = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=True))
        blocks.clear()
        prefill(eager, new_state(eager, 1), 0, ids)
        assert set(blocks) == {1}
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-5}[dtype]
    for in_blocks in found[:-1]:
        for one, whole in zip(in_blocks, found[-1], strict=True):
            assert torch.equal(one.isnan(), whole.isnan())
            assert (one - whole).nan_to_num().abs().max() <= tolerance * whole.nan_to_num().abs().max()
    if dtype is torch.float32:
        assert logits(model, found[0][0][-1:]).argmax() == pair.hf_greedy(ids, 1)[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_writes_its_row_alone(family, small_pair, random_ids):
    model = small_pair(family).ours
    state = new_state(model, 3)
    for row in range(3):
        prefill(model, state, row, random_ids(20 + row, seed=row))
    decode_step(ops_of(model), model, state)
    tensors = [state.token, state.position, state.done, state.x, *state.cache.keys, *state.cache.values]
    before = [tensor[[0, 2]].clone() for tensor in tensors]
    prefill(model, state, 1, random_ids(33, seed=9))
    assert all(torch.equal(tensor[[0, 2]], kept) for tensor, kept in zip(tensors, before, strict=True))
    assert state.position.tolist() == [21, 33, 23]


@pytest.mark.parametrize(
    ("row", "ids", "message"),
    [
        (0, [], "1 to max_seq_len = 256 tokens, got 0"),
        (0, [5] * 257, "1 to max_seq_len = 256 tokens, got 257"),
        (0, [5, 499], "token ids from 0 to 498, got 499"),
        (0, [-1, 5], "token ids from 0 to 498, got -1"),
        (1, [5], "row: expected 0 to 0, got 1"),
    ],
    ids=["empty", "too-long", "past-vocabulary", "negative", "no-such-row"],
)
def test_bad_prompts_are_refused_before_anything_changes(row, ids, message, small_pair):
    state = new_state(small_pair("gemma3").ours, 1)
    with pytest.raises(ValueError, match=message):
        prefill(small_pair("gemma3").ours, state, row, ids)
    assert state.position.item() == 0
    assert not any(buffer.any() for buffer in state.cache.keys)


def new_rows(model, rows: int) -> DecodeState:
    """A state whose every cache slot is NaN-poisoned."""
    state = new_state(model, rows, with_logits=True)
    for buffer in (*state.cache.keys, *state.cache.values):
        buffer.fill_(torch.nan)
    return state


def per_row(state: DecodeState) -> list[torch.Tensor]:
    """All that belongs to rows, between steps."""
    return [state.token, state.position, state.done, state.x, state.logits, *state.cache.keys, *state.cache.values]


MOVES = st.lists(
    st.sampled_from(["advance 0", "advance 1", "layer 0", "layer 1", "step", "move 0", "move 1", "poison"]), max_size=30
)


@pytest.mark.parametrize("in_buckets", [False, True], ids=["unpadded", "in buckets"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MOVES, st.sampled_from([3, 8, 16, 20]), st.integers(1, 70), st.integers(1, 70))
def test_a_prompt_under_way_is_left_alone(small_pair, random_ids, family, in_buckets, moves, chunk, one, other):
    """Two prompts advance in turns, chunk by chunk and layer by layer, while another row decodes, steps run over theirs
    between chunks, and rows are moved: each ends as it does alone.

    "poison" fills the slots that a step over their rows writes, the worst that such a step could do.
    """
    model = small_pair(family).in_chunks(chunk).ours
    state = new_rows(model, 4)
    prefill(model, state, 0, random_ids(9, seed=9))
    prompts = [random_ids(length, seed=length) for length in (one, other)]
    running = [Prefill(model, state, row, ids, in_buckets=in_buckets) for row, ids in enumerate(prompts, 1)]
    free = 3
    for move in [*moves, *["advance 0", "advance 1"] * 24]:
        what, _, which = move.partition(" ")
        prompt, ids = running[int(which or 0)], prompts[int(which or 0)]
        if what == "step":
            is_between = all(each.tokens == state.position[each.row] for each in running if not each.is_done)
            decode_step(ops_of(model), model, state if is_between else state.first_rows(1))
        elif what == "poison":
            for buffer in (*state.cache.keys, *state.cache.values):
                for each in running:
                    if not each.is_done and each.tokens == state.position[each.row]:
                        buffer[each.row, :, int(state.position[each.row]) % buffer.shape[2]] = torch.nan
        elif prompt.is_done:
            continue
        elif what == "move":
            for tensor in per_row(state):
                tensor[free] = tensor[prompt.row]
            prompt.row, free = free, prompt.row
        else:
            least, most = prompt.next_work, {"layer": 0, "advance": math.inf}[what]
            done = prompt.advance(most)
            assert done == pytest.approx(least) if most == 0 else done >= least
        for each, length in zip(running, (one, other), strict=True):
            if not each.is_done:
                assert state.done[each.row] and state.position[each.row] % chunk == 0
                assert each.next_tokens == min(chunk, length - state.position[each.row])
        if what in ("advance", "layer") and prompt.is_done:  # before a step takes it further
            alone = new_rows(model, 1)
            run(Prefill(model, alone, 0, ids, in_buckets=in_buckets))
            held = range(len(ids))
            for mine, expected in zip(per_row(state), per_row(alone), strict=True):
                mine, expected = mine[prompt.row], expected[0]
                if mine.dim() == 3:  # what steps read of a cache
                    mine, expected = (
                        cache[:, [at % cache.shape[1] for at in held][-cache.shape[1] :]] for cache in (mine, expected)
                    )
                assert torch.equal(mine, expected)
    assert all(prompt.is_done for prompt in running)


@pytest.mark.parametrize("budget", [1, 8, 30, 64, 1000])
@pytest.mark.parametrize("length", [5, 33, 100, 133])
def test_no_more_than_the_budget_is_run_at_a_time(length, budget, small_pair, random_ids):
    """But for a single layer, or a short chunk, which is never split; and all of it is counted."""
    pair = small_pair("gemma3").in_chunks(64)
    prompt = Prefill(pair.ours, new_state(pair.ours, 1), 0, random_ids(length))
    total = 0.0
    while not prompt.is_done:
        least = prompt.next_work
        done = prompt.advance(budget)
        assert 0 < done <= max(budget, least) + 1e-6
        total += done
    chunks = math.ceil(length / 64)
    assert total == pytest.approx(length + chunks * READING_WORK)


def run(prompt: Prefill) -> None:
    while not prompt.is_done:
        prompt.advance()

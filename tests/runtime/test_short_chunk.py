"""Short chunks of a prompt on a CPU's compiled kernels: bit for bit what decode steps compute, a token at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from runtime.engine.decode import stepper
from runtime.engine.prefill import logits, prefill
from runtime.engine.short_chunk import MOST_TOKENS, is_short, short_chunk
from runtime.families.state import new_state
from runtime.kernels.advance import embed_torch
from runtime.kernels.cpu import calls as cpu_calls

MISSING = cpu_calls.missing(torch.float32)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}")

CUTS = (1, 6, 16, 9, 15, 16, 12)  # well past the small models' windows of 16, around whose rings most of them go
every_model = [
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"]),
    pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"]),
]


def with_limits(model, **limits):
    return dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, **limits))


def stepped(model, ids):
    """A state after a decode step for each token, and each step's logits and token."""
    state = new_state(model, 1, with_logits=True)
    step, logits, tokens = stepper(model, state), [], []
    for at, token in enumerate(ids):
        state.x.copy_(embed_torch(model.weights.embedding, torch.tensor([token]), state.embed_scale))
        state.position.fill_(at)
        state.done.fill_(False)
        step()
        logits.append(state.logits[0].clone())
        tokens.append(int(state.token))
    return state, logits, tokens


@every_model[0]
@every_model[1]
def test_a_short_chunk_has_the_bits_of_decode_steps(family, dtype, small_pair, random_ids):
    model, ids, row = small_pair(family, dtype).ours, random_ids(sum(CUTS)), 1
    expected, expected_logits, tokens = stepped(model, ids)
    for threads in (1, 2):
        limited = with_limits(model, threads=threads)
        state = new_state(limited, 3, with_logits=True)
        caches = [*state.cache.keys, *state.cache.values]
        for cache in caches:
            cache.fill_(torch.nan)
        start = 0
        for count in CUTS:
            end = start + count
            last = end == len(ids) or count != 6  # a chunk whose next token nobody wants leaves the same cache
            picked = short_chunk(limited, state, row, torch.tensor(ids[start:end]), start, last)
            assert (picked is not None) == last
            if picked is not None:
                assert int(picked[0]) == tokens[end - 1]
                assert torch.equal(picked[1][0], expected_logits[end - 1])
            start = end
        for cache, wanted in zip(caches, [*expected.cache.keys, *expected.cache.values], strict=True):
            written = min(len(ids), cache.shape[2])
            assert torch.equal(cache[row, :, :written], wanted[0, :, :written])
            assert cache[[0, 2]].isnan().all()
            assert cache[row, :, written:].isnan().all()


def test_a_short_prompt_is_ready_for_its_first_step(small_pair, random_ids):
    model, ids = small_pair("gemma3").ours, random_ids(11)
    _, expected, tokens = stepped(model, ids)
    state = new_state(model, 2, stop_ids=(tokens[-1],), with_logits=True)
    assert int(prefill(model, state, 1, ids)) == tokens[-1]
    assert torch.equal(state.logits[1], expected[-1])
    assert (int(state.position[1]), bool(state.done[1])) == (11, True)
    embedding = embed_torch(model.weights.embedding, torch.tensor(tokens[-1:]), state.embed_scale)
    assert torch.equal(state.x[1], embedding[0])


@pytest.mark.parametrize("count", [MOST_TOKENS, MOST_TOKENS + 1], ids=["short", "long"])
def test_fp32_tokens_equal_hugging_face(count, small_pair, random_ids):
    pair, ids = small_pair("gemma2"), random_ids(64 + count)
    ours = pair.in_chunks(64).ours
    assert is_short(ours, count) == (count == MOST_TOKENS)
    assert int(prefill(ours, new_state(ours, 1), 0, ids)) == pair.hf_greedy(ids, 1)[0][0]


def test_one_capture_serves_every_length(small_pair, random_ids):
    model = small_pair("gemma").ours
    state, seen = new_state(model, 1), []
    for count in (3, MOST_TOKENS, 1):
        prefill(model, state, 0, random_ids(count))
        seen += state.graphs.values()
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]


def test_what_is_not_short(small_pair):
    model = small_pair("gemma3").ours
    assert is_short(model, 1)
    assert is_short(model, MOST_TOKENS)
    assert not is_short(model, MOST_TOKENS + 1)
    assert not is_short(with_limits(model, eager=True), 1)
    assert not is_short(small_pair("gemma3", torch.float16).ours, 1)


@every_model[0]
@every_model[1]
def test_residuals_are_what_the_token_is_picked_from(family, dtype, small_pair, random_ids):
    """And a call that wants them computes the same."""
    model, ids = small_pair(family, dtype).ours, random_ids(11)
    _, expected, _ = stepped(model, ids)
    states = []
    hidden = torch.full((len(ids), model.config.hidden), torch.nan, dtype=model.dtype)
    for hidden_out in (None, hidden):
        states.append(new_state(model, 1, with_logits=True))
        prefill(model, states[-1], 0, ids, hidden_out=hidden_out)
    assert torch.equal(states[0].logits, states[1].logits)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(logits(model, hidden), torch.stack(expected), atol=tolerance, rtol=tolerance)

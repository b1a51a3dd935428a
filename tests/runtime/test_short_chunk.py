"""Short chunks of a prompt on a CPU's compiled kernels: bit for bit what decode steps compute, a token at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from runtime.engine.decode import stepper
from runtime.engine.prefill import prefill
from runtime.engine.short_chunk import is_short, most_tokens, short_chunk
from runtime.families.state import new_state
from runtime.kernels.advance import embed_torch
from runtime.kernels.cpu import calls as cpu_calls

MISSING = cpu_calls.missing(torch.float32)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}")

SHORT = most_tokens(torch.float32)
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
    expected, logits, tokens = stepped(model, ids)
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
                assert torch.equal(picked[1][0], logits[end - 1])
            start = end
        for cache, wanted in zip(caches, [*expected.cache.keys, *expected.cache.values], strict=True):
            written = min(len(ids), cache.shape[2])
            assert torch.equal(cache[row, :, :written], wanted[0, :, :written])
            assert cache[[0, 2]].isnan().all()
            assert cache[row, :, written:].isnan().all()


def test_a_short_prompt_is_ready_for_its_first_step(small_pair, random_ids):
    model, ids = small_pair("gemma3").ours, random_ids(11)
    _, logits, tokens = stepped(model, ids)
    state = new_state(model, 2, stop_ids=(tokens[-1],), with_logits=True)
    assert int(prefill(model, state, 1, ids)) == tokens[-1]
    assert torch.equal(state.logits[1], logits[-1])
    assert (int(state.position[1]), bool(state.done[1])) == (11, True)
    embedding = embed_torch(model.weights.embedding, torch.tensor(tokens[-1:]), state.embed_scale)
    assert torch.equal(state.x[1], embedding[0])


@pytest.mark.parametrize("count", [SHORT, SHORT + 1], ids=["short", "long"])
def test_fp32_tokens_equal_hugging_face(count, small_pair, random_ids):
    pair, ids = small_pair("gemma2"), random_ids(64 + count)
    ours = pair.in_chunks(64).ours
    assert is_short(ours, count) == (count == SHORT)
    assert int(prefill(ours, new_state(ours, 1), 0, ids)) == pair.hf_greedy(ids, 1)[0][0]


def test_one_capture_serves_every_length(small_pair, random_ids):
    model = small_pair("gemma").ours
    state, seen = new_state(model, 1), []
    for count in (3, SHORT, 1):
        prefill(model, state, 0, random_ids(count))
        seen += state.graphs.values()
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]


def test_what_is_not_short(small_pair):
    model = small_pair("gemma3").ours
    assert is_short(model, 1)
    assert is_short(model, SHORT)
    assert not is_short(model, SHORT + 1)
    assert not is_short(with_limits(model, eager=True), 1)
    assert not is_short(small_pair("gemma3", torch.float16).ours, 1)


def test_residuals_are_those_of_hugging_faces_operations(small_pair, random_ids):
    """A call that wants them keeps to PyTorch, eager or not."""
    model, ids = small_pair("gemma3", torch.bfloat16).ours, random_ids(7)
    results = []
    for run in (model, with_limits(model, eager=True)):
        hidden = torch.empty(len(ids), model.config.hidden, dtype=model.dtype)
        state = new_state(run, 1, with_logits=True)
        prefill(run, state, 0, ids, hidden_out=hidden)
        assert not state.graphs
        results.append((hidden, state.logits))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))

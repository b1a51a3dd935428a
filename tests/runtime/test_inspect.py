"""runtime.inspect: what it shows is what generate does."""

import dataclasses
import json
import math

import pytest
import torch

import runtime
from runtime.engine.prefill import logits, prefill
from runtime.families.state import new_state
from runtime.kernels.argmax import top_k


@pytest.fixture
def seen(tiny):
    return runtime.inspect(tiny, "the dog", steps=20)


def hidden_of(model, ids):
    hidden = torch.empty(len(ids), model.config.hidden, dtype=model.dtype)
    prefill(model, new_state(model, 1), 0, ids, hidden_out=hidden)
    return hidden


def test_the_steps_are_what_generate_picks(tiny, seen):
    result = runtime.generate(tiny, "the dog", max_new_tokens=20)
    assert tuple(step.id for step in seen.steps) == result.token_ids
    assert seen.text == result.text
    assert all(step.time_ms > 0 for step in seen.steps)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_bf16_prompts_of_every_length_begin_with_what_generate_picks(family, small_pair, random_ids):
    """Where logits nearly tie, another form of prefill would show another token."""
    model = small_pair(family, torch.bfloat16).in_chunks(32).ours
    for length in (*range(1, 36), 47, 48, 49, 64, 70):
        ids = random_ids(length, seed=length)
        seen = runtime.inspect(model, ids, steps=2)
        first, step = seen.positions[0].candidates[0], seen.steps[0]
        assert (first.id, first.logit) == (step.id, seen.steps[0].margin + seen.positions[0].candidates[1].logit)
        picked = runtime.generate(model, ids, max_new_tokens=2, ignore_eos=True).token_ids
        assert tuple(step.id for step in seen.steps) == picked[: len(seen.steps)]


def test_the_steps_end_at_a_stop_token(tiny):
    picked = runtime.generate(tiny, "the dog", max_new_tokens=20, ignore_eos=True).token_ids
    config = dataclasses.replace(tiny.config, stop_token_ids=(picked[4],))
    steps = runtime.inspect(dataclasses.replace(tiny, config=config), "the dog", steps=20).steps
    assert tuple(step.id for step in steps) == picked[: picked.index(picked[4]) + 1]


def test_the_prompt_as_the_model_sees_it(tiny, seen):
    ids = tiny.tokenizer.encode("the dog")
    assert [token.id for token in seen.prompt] == ids
    assert "".join(token.text for token in seen.prompt) == "<bos>the dog"
    assert seen.logits_shape == (1, len(ids), tiny.config.vocab)


def test_candidates_at_the_default_positions(tiny, seen):
    ids = tiny.tokenizer.encode("the dog")
    rows = logits(tiny, hidden_of(tiny, ids))
    assert [position.index for position in seen.positions] == [len(ids) - 1, len(ids) - 2]
    for position in seen.positions:
        row = rows[position.index]
        assert [best.rank for best in position.candidates] == [1, 2, 3, 4, 5]
        assert [best.id for best in position.candidates] == row.argsort(descending=True)[:5].tolist()
        for best in position.candidates:
            assert math.isclose(best.logit, row[best.id].item(), rel_tol=1e-5)  # the decode step's head adds otherwise
            assert math.isclose(best.probability, row.softmax(0)[best.id].item(), rel_tol=1e-5)
            assert best.text == tiny.tokenizer.piece(best.id)
    assert seen.positions[0].candidates[0].id == seen.steps[0].id


def test_margins(tiny, seen):
    ids = tiny.tokenizer.encode("the dog")
    first, second = seen.positions[0].candidates[:2]
    assert seen.steps[0].margin == first.logit - second.logit
    assert seen.steps[0].runner_up == second
    for at, step in enumerate(seen.steps[:5]):
        again = runtime.inspect(tiny, ids + [earlier.id for earlier in seen.steps[:at]])
        best, runner_up = again.positions[0].candidates[:2]
        assert (best.id, runner_up.id) == (step.id, step.runner_up.id)
        assert math.isclose(best.logit - runner_up.logit, step.margin, abs_tol=1e-4)


def test_equal_logits_rank_by_id(tiny):
    zeros = torch.zeros_like(tiny.weights.embedding)
    flat = dataclasses.replace(tiny.weights, embedding=zeros, head=zeros)
    seen = runtime.inspect(dataclasses.replace(tiny, weights=flat), [9, 8], top_k=7, steps=3)
    for position in seen.positions:
        assert [best.id for best in position.candidates] == list(range(7))
    assert [(step.id, step.margin, step.runner_up.id) for step in seen.steps] == [(0, 0.0, 1)] * 3


def test_any_position_any_count(tiny):
    ids = [2, 9, 80, 281, 270, 33]
    seen = runtime.inspect(tiny, ids, top_k=299, positions=[0, -1, 3, 3])
    assert [position.index for position in seen.positions] == [0, 5, 3, 3]
    for position in seen.positions:
        assert sorted(best.id for best in position.candidates) == list(range(299))
        assert math.isclose(sum(best.probability for best in position.candidates), 1, rel_tol=1e-5)
    assert runtime.inspect(tiny, ids, positions=[]).positions == ()


def test_a_prompt_of_one_token_has_one_position(tiny):
    assert [position.index for position in runtime.inspect(tiny, [2]).positions] == [0]


def test_structure(tiny, seen):
    shapes = {module.name: module.shape for module in seen.structure}
    assert shapes["embedding"] == (299, 40)
    assert shapes["layers.*.qkv"] == ((4 + 2 * 2) * 12, 40)
    assert shapes["layers.*.gate_up"] == (2 * 76, 40)
    assert shapes["layers.*.q_norm"] == (12,)
    assert seen.parameters == tiny.plan.weights // 4
    assert len(seen.layers) == 2 and seen.layers[0].startswith("2 layers with a window of 16")


def test_it_prints_and_serialises(tiny, seen):
    text = str(seen)
    for shown in ("[1, 8]", "[1, 8, 299]", "'<bos>'", "margin", "layers.*.down", " ms"):
        assert shown in text
    assert all(line == line.rstrip() for line in text.splitlines())
    again = json.loads(json.dumps(seen.to_dict()))
    assert [step["id"] for step in again["steps"]] == [step.id for step in seen.steps]


def test_without_a_tokenizer_there_are_ids_only(tiny, seen):
    bare = dataclasses.replace(tiny, tokenizer=None)
    ids = [token.id for token in seen.prompt]
    plain = runtime.inspect(bare, ids, steps=3)
    assert [step.id for step in plain.steps] == [step.id for step in seen.steps[:3]]
    assert plain.text == "" and "'" not in str(plain)


def test_it_leaves_the_request_state_alone(tiny):
    runtime.generate(tiny, "the dog", max_new_tokens=2)
    state = tiny.engine.state
    runtime.inspect(tiny, "A", steps=2)
    assert tiny.engine.state is state and state.logits is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": ""}, ValueError, "prompt is empty"),
        ({"prompt": ["the", "dog"]}, TypeError, "prompt must be one prompt, got a batch of 2"),
        ({"prompt": [299]}, ValueError, "from 0 to 298"),
        ({"top_k": 0}, ValueError, "top_k must be from 1 to 299, got 0"),
        ({"top_k": 300}, ValueError, "top_k must be from 1 to 299, got 300"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer"),
        ({"positions": [8]}, ValueError, "position must be from -8 to 7, got 8"),
        ({"positions": [-9]}, ValueError, "position must be from -8 to 7, got -9"),
        ({"positions": 3}, TypeError, "positions must be a list"),
        ({"steps": -1}, ValueError, "steps must be at least 0"),
        ({"steps": 121}, ValueError, "max_seq_len = 128"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input(tiny, arguments, error, message):
    with pytest.raises(error, match=message):
        runtime.inspect(tiny, **{"prompt": "the dog"} | arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_of_equal_logits_the_lower_ids_are_the_best(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (4, 1000), generator=generator).to(dtype)
    logits[1, ::3] = -0.0
    logits[2, 5] = -torch.inf
    expected = logits.float().sort(dim=1, descending=True, stable=True)
    for k in (1, 7, 1000):
        ids, values = top_k(logits, k)
        assert torch.equal(ids, expected.indices[:, :k])
        assert torch.equal(values, logits.gather(1, ids)) and values.dtype is dtype
    for k in (0, 1001):
        with pytest.raises(ValueError, match=rf"k: expected 1 to 1000 .* got {k}"):
            top_k(logits, k)

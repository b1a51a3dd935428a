"""Guesses checked on a GPU, captured and eager: tokens, logits and caches are those of plain steps, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

import runtime
from runtime.bench.shapes import random_model
from runtime.engine.answer import Answer
from runtime.engine.decode import stepper
from runtime.engine.prefill import prefill
from runtime.engine.speculation import Speculation
from runtime.engine.step_cost import StepCost
from runtime.families.state import new_state
from runtime.model.published import PUBLISHED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; this machine has none"),
]
# tests/test_gpu_tests.py runs some of these tests at toy size on a CPU, with others of these. Six layers of Gemma 3 are
# five of a sliding window and one without.
DEVICE, SMALL, SEQ, PROMPT, STEPS = "cuda", {"num_hidden_layers": 6}, 1024, 600, 60
OPTIONS = {"max_new_tokens": 48, "ignore_eos": True}


def ids_of(model, count, seed=0):
    return random.Random(seed).choices(range(3, model.config.vocab), k=count)


def moment(model, state):
    """What the first row is between two steps: its token, position and done, and every tensor that later steps read."""
    position = int(state.position[0])
    caches = [cache[0, :, : min(position, cache.shape[2])] for cache in (*state.cache.keys, *state.cache.values)]
    return (int(state.token[0]), position, bool(state.done[0])), [
        tensor.clone() for tensor in (state.x[0], state.logits[0], *caches)
    ]


@pytest.mark.parametrize("limits", [{}, {"eager": True}], ids=["captured", "eager"])
@pytest.mark.parametrize("max_batch", [8, 3, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_checked_guesses_leave_what_plain_steps_leave(name, dtype, max_batch, limits):
    model = random_model(name, DEVICE, dtype, max_seq_len=SEQ, max_batch=max_batch, **SMALL)
    model.runtime = dataclasses.replace(model.runtime, **limits)
    ids, drawn = ids_of(model, PROMPT), random.Random(1)
    plain, state = (new_state(model, max_batch, with_logits=True) for _ in range(2))
    prefill(model, plain, 0, ids)
    step, moments = stepper(model, plain.first_rows(1)), [moment(model, plain)]
    for _ in range(STEPS):
        step()
        moments.append(moment(model, plain))

    prefill(model, state, 0, ids)
    step, speculation = stepper(model, state.first_rows(1)), Speculation(model, state)
    answer, at, lengths = Answer(0, None, STEPS + 1, prompt=ids), 0, []
    answer.take(moments[0][0][0])
    while at < STEPS:
        right = [numbers[0] for numbers, _ in moments[at + 1 : at + 1 + drawn.randint(1, speculation._most)]]
        right = right[: STEPS - at - 1]
        if not right or drawn.random() < 0.2:
            step()
            tokens = state.first_token()
        else:
            kept = drawn.randrange(len(right) + 1)
            tokens = speculation.check(model, answer, right[:kept] + ids_of(model, len(right) - kept, at)).tokens
            lengths.append(len(tokens))
        at += len(tokens)
        (expected, tensors), (given, own) = moments[at], moment(model, state)
        assert given == expected and tokens[-1] == expected[0]
        assert all(torch.equal(*both) for both in zip(own, tensors, strict=True)), (at, lengths)
        for token in tokens:
            answer.take(token)
    assert max(lengths) == speculation._most + 1


@pytest.fixture
def everything_checked(monkeypatch):
    """Whatever pays on this machine."""
    monkeypatch.setattr(StepCost, "of", lambda cost, rows: 1 + rows / 1e6)


@pytest.mark.usefixtures("everything_checked")
@pytest.mark.parametrize("limits", [{}, {"steps_per_graph": 4}, {"eager": True}], ids=str)
def test_prompt_lookup_gives_the_plain_tokens(limits):
    model = random_model("gemma-3-270m", DEVICE, "bfloat16", max_seq_len=SEQ, max_batch=8, **SMALL)
    model.runtime = dataclasses.replace(model.runtime, **limits)
    prompt = ids_of(model, 17) * 3
    first = runtime.generate(model, prompt, **OPTIONS)
    for again in (prompt, [*prompt, *first.token_ids, *prompt]):  # the second may be quoted
        expected = runtime.generate(model, again, **OPTIONS)
        assert runtime.generate(model, again, speculate="prompt", **OPTIONS).token_ids == expected.token_ids


@pytest.mark.parametrize("stop_at", [None, 5, 20])
def test_right_guesses_are_handed_out_in_order_beside_answers_that_come_and_go(stop_at, monkeypatch):
    model = random_model("gemma-3-270m", DEVICE, "bfloat16", max_seq_len=SEQ, max_batch=8, **SMALL)
    prompts = [ids_of(model, 9, seed) for seed in (1, 2)]
    whole = [runtime.generate(model, prompt, **OPTIONS).token_ids for prompt in prompts]
    counts = []

    def guesses(self, answer, most):
        at = len(answer.token_ids)
        right = [*dict(zip(map(tuple, prompts), whole, strict=True))[tuple(answer.prompt)]]
        counts.append(min(most, self._most))
        return [token if (at + i) % 5 else 7 for i, token in enumerate(right[at : at + counts[-1]])]

    monkeypatch.setattr(Speculation, "guesses", guesses)
    options, expected = OPTIONS, whole[0]
    if stop_at is not None:
        end = next(at for at in range(stop_at, len(expected)) if expected[at] not in expected[:at])
        options, expected = {"max_new_tokens": 48}, expected[: end + 1]
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, stop_token_ids=expected[-1:]))
    first = runtime.stream(model, prompts[0], speculate="prompt", **options)
    got = [piece.token_ids[0] for piece in itertools.islice(first, 3)]
    second = runtime.generate(model, prompts[1], max_new_tokens=9, ignore_eos=True)
    assert second.token_ids == whole[1][:9]
    assert tuple(got + [piece.token_ids[0] for piece in first]) == expected
    assert max(counts) == 7


def test_a_model_of_one_row_refuses():
    model = random_model("gemma-3-270m", DEVICE, "bfloat16", max_seq_len=SEQ, **SMALL)
    with pytest.raises(runtime.InvalidArgument, match="max_batch of at least 2, better 8, got 1"):
        runtime.generate(model, [5, 6, 7], speculate="prompt")

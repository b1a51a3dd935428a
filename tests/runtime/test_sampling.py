"""Tokens that are drawn: equal seeds give equal answers however they run, and the distribution is Hugging Face's."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats

import runtime
from runtime.families.state import new_state
from runtime.kernels.cpu import calls as cpu_calls
from runtime.sampling.params import MOST_INVERSE_TEMPERATURE, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")
MISSING = cpu_calls.missing(torch.float32)

IDS = [2, *(7 + (5 * k) % 90 for k in range(40))]  # a long chunk and a short one
OPTIONS = {"max_new_tokens": 24, "ignore_eos": True}
DRAWN = OPTIONS | {"temperature": 1.3, "seed": 11}


@pytest.fixture(scope="module")
def pair(small_pair):
    return small_pair("gemma3", sliding_window=16)


@pytest.fixture(scope="module")
def small(pair):
    return dataclasses.replace(pair.ours)


def tokens(model, ids=IDS, **options):
    return runtime.generate(model, ids, **DRAWN | options).token_ids


def test_equal_seeds_give_equal_answers_and_others_others(small):
    first = tokens(small)
    assert tokens(small) == first and tokens(small, reuse=False) == first
    assert tokens(small, seed=12) != first and tokens(small, temperature=0.1) != first
    assert tokens(small, seed=11 + 2**32) != first, "all 64 bits count"
    assert tokens(small, seed=2**64 - 1) == tokens(small, seed=np.uint64(2**64 - 1))
    greedy = tokens(small, temperature=0)
    assert greedy == runtime.generate(small, IDS, **OPTIONS).token_ids != first


def test_an_answer_depends_on_nothing_beside_it(small):
    """Streamed, in a batch of greedy and drawn rows of other seeds and in the other order."""
    first, greedy = tokens(small), runtime.generate(small, IDS, **OPTIONS).token_ids
    assert tuple(piece.token_ids[0] for piece in runtime.stream(small, IDS, **DRAWN)) == first
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        sampling = [(1.3, 11), (0, 11), (0.2, 5), (1.3, 12)]
        results = runtime.generate(
            small,
            [IDS] * 4,
            **OPTIONS,
            temperature=[sampling[i][0] for i in order],
            seed=[sampling[i][1] for i in order],
        )
        assert results[order.index(0)].token_ids == first
        assert results[order.index(1)].token_ids == greedy
        assert [result.seed for result in results] == [sampling[i][1] if i != 1 else None for i in order]


@pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}")
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_plain_steps_draw_the_same(small_pair, family):
    """In fp32, where the bits of compiled and plain steps differ, but by less than any two scores of these."""
    model = small_pair(family).ours
    eager = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=True))
    for length in (1, 9, 41):
        assert tokens(eager, IDS[:length]) == tokens(model, IDS[:length])


@pytest.mark.skipif(bool(MISSING), reason=f"no kernels that check guesses: {MISSING}")
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.3])
def test_guesses_are_checked_against_what_is_drawn(small, temperature, monkeypatch):
    """A low temperature makes the answer repeat itself, so that many guesses come true; a high one few."""
    from runtime.engine.step_cost import StepCost

    monkeypatch.setattr(StepCost, "of", lambda cost, rows: 1.0)  # guesses always pay
    ids, options = [2, *[9, 8, 7] * 5], {"max_new_tokens": 60, "temperature": temperature}
    assert tokens(small, ids, speculate="prompt", **options) == tokens(small, ids, **options)


def test_a_seed_that_nobody_chose_is_told(small):
    results = runtime.generate(small, [IDS] * 3, **OPTIONS, temperature=1.3)
    assert len({result.seed for result in results}) == 3 and len({result.token_ids for result in results}) == 3
    again = json.loads(json.dumps(results[1].to_dict()))["seed"]
    assert tokens(small, seed=again) == results[1].token_ids
    assert runtime.generate(small, IDS, **OPTIONS, seed=3).seed is None


def test_first_tokens_have_the_distribution_of_hugging_faces_logits(pair):
    """A chi-square test of the likely tokens and all others together."""
    count, ids = 1000, IDS[:5]
    with torch.inference_mode():
        logits = pair.hf(torch.tensor([ids])).logits[0, -1].double()
    temperature = float(logits.std()) / 3
    share = (logits / temperature).softmax(dim=0)
    options = {"max_new_tokens": 1, "temperature": temperature, "seed": list(range(count))}
    results = runtime.generate(dataclasses.replace(pair.ours), [ids] * count, **options)
    drawn = torch.bincount(torch.tensor([result.token_ids[0] for result in results]), minlength=len(share))
    likely = share * count >= 10
    groups = [(drawn[likely], share[likely]), (drawn[~likely].sum()[None], share[~likely].sum()[None])]
    seen, expected = (torch.cat(parts) for parts in zip(*groups, strict=True))
    assert len(seen) > 5
    assert stats.chisquare(seen, expected * count).pvalue > 1e-3


def test_a_row_that_moves_keeps_its_numbers(small):
    state = new_state(small, 3)
    state.set_row(2, (), 99, 2**64 - 5, 0.75)
    assert (state.seed[2], state.inverse_temperature[2]) == (-5, 0.75), "the same 64 bits"
    state.move_row(2, 0, 0)
    assert (state.seed[0], state.inverse_temperature[0]) == (-5, 0.75)
    state.reset()
    assert not state.seed.any() and not state.inverse_temperature.any()


def test_the_least_temperatures_pick_the_greatest_logit(small):
    greedy = runtime.generate(small, IDS, **OPTIONS).token_ids
    for temperature in (1e-6, 1e-30, 5e-324):
        assert tokens(small, temperature=temperature) == greedy
    assert SamplingParams(5e-324).inverse_temperature == MOST_INVERSE_TEMPERATURE


def test_a_prompt_filled_layer_by_layer_is_drawn_by_its_own_row(small):
    """While others decode: the row of a prompt may move meanwhile."""
    expected = tokens(small, IDS)
    others = runtime.stream(small, [IDS[:5], IDS[:6]], **OPTIONS)
    pieces = iter(others)
    next(pieces)
    late = runtime.stream(small, IDS, **DRAWN)
    late.submit()
    next(pieces)
    others.cancel()
    assert tuple(piece.token_ids[0] for piece in late) == expected

"""Answers that choose their tokens from all logits: each gets what it asks for, and nobody beside it notices."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch

import runtime
from runtime.engine.answer import Answer
from runtime.engine.prompt_logprobs import ScoredPrefill
from runtime.kernels.cpu import calls as cpu_calls

pytestmark = pytest.mark.usefixtures("one_thread")
MISSING = cpu_calls.missing(torch.float32)

IDS = [2, *(7 + (5 * k) % 90 for k in range(40))]  # a long chunk and a short one
OPTIONS = {"max_new_tokens": 16, "ignore_eos": True}
CHOICES = {
    "greedy": {},
    "drawn": {"temperature": 1.3, "seed": 11},
    "top-k": {"temperature": 1.3, "seed": 11, "top_k": 5},
    "top-p": {"temperature": 0.9, "seed": 12, "top_p": 0.7},
    "min-p": {"temperature": 1.5, "seed": 13, "min_p": 0.2},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    "bias": {"logit_bias": {5: 4.0, 9: -math.inf}, "temperature": 0.8, "seed": 14},
    "logprobs": {"logprobs": 3},
}


@pytest.fixture(scope="module")
def pair(small_pair):
    return small_pair("gemma3", sliding_window=16)


@pytest.fixture(scope="module")
def small(pair):
    return dataclasses.replace(pair.ours)


def generate(model, ids=IDS, **options):
    return runtime.generate(model, ids, **OPTIONS | options)


@pytest.fixture(scope="module")
def alone(small):
    return {name: generate(small, **choice).token_ids for name, choice in CHOICES.items()}


def test_every_choice_makes_a_difference(alone):
    assert alone["logprobs"] == alone["greedy"]
    assert len(set(alone.values())) == len(alone) - 1


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_an_answer_depends_on_nothing_beside_it(small, alone, rows):
    """Greedy, drawn and choosing rows together, in both orders, in models of one row and more."""
    model = dataclasses.replace(small, runtime=dataclasses.replace(small.runtime, max_batch=rows))
    for names in (list(CHOICES), list(CHOICES)[::-1]):
        streams = [runtime.Engine(model).submit(IDS, **OPTIONS | CHOICES[name]) for name in names]
        for name, stream in zip(names, streams, strict=True):
            assert tuple(piece.token_ids[0] for piece in stream) == alone[name]


def test_of_a_batch_each_prompt_may_have_its_own_numbers(small, alone):
    results = generate(
        small,
        [IDS, IDS, IDS],
        temperature=[1.3, 0.9, 0],
        seed=[11, 12, None],
        top_k=[5, None, None],
        top_p=[None, 0.7, None],
        repetition_penalty=[None, None, 1.3],
        presence_penalty=[0, 0, 0.5],
        frequency_penalty=[0.0, 0.0, 0.25],
        logprobs=[None, 2, None],
    )
    assert [result.token_ids for result in results] == [alone["top-k"], alone["top-p"], alone["penalties"]]
    assert [result.logprobs is None for result in results] == [True, False, True]


@pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}")
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_plain_steps_choose_the_same(small_pair, family):
    model = small_pair(family).ours
    eager = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=True))
    for choice in CHOICES.values():
        assert generate(eager, IDS[:9], **choice).token_ids == generate(model, IDS[:9], **choice).token_ids


def test_an_answer_that_is_to_be_guessed_at_chooses_too(small, alone):
    for name, choice in CHOICES.items():
        assert generate(small, speculate="prompt", **choice).token_ids == alone[name]


def test_an_answer_cut_short_chooses_the_same_again(small, alone, monkeypatch):
    """Whatever interrupts a step, answers begin anew from their prompts."""
    from runtime.engine.decode import DeviceSteps

    plain, calls = DeviceSteps.choose, []

    def interrupted(device, *arguments):
        plain(device, *arguments)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    model = dataclasses.replace(small)
    other = runtime.Engine(model).submit(IDS, **OPTIONS | CHOICES["penalties"])
    monkeypatch.setattr(DeviceSteps, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, **CHOICES["top-k"])
    assert tuple(piece.token_ids[0] for piece in other) == alone["penalties"] and len(calls) > 5


def test_log_probabilities_are_hugging_faces(pair, small):
    """Of the answer and of the prompt, within a few units in the last place of a logit; the likeliest first."""
    result = generate(small, logprobs=4, prompt_logprobs=2, temperature=1.2, seed=5)
    with torch.inference_mode():
        logits = pair.hf(torch.tensor([[*IDS, *result.token_ids]])).logits[0].double()
    expected = logits.log_softmax(dim=1)
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == len(IDS)
    entries = [*result.prompt_logprobs[1:], *result.logprobs]
    assert [entry.token_id for entry in entries] == [*IDS[1:], *result.token_ids]
    for at, entry in enumerate(entries):
        row = expected[at]
        assert abs(entry.logprob - row[entry.token_id]) < 2e-5
        count = 2 if at < len(IDS) - 1 else 4
        best = row.topk(count)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert torch.allclose(torch.tensor([p for _, p in entry.top]).double(), best.values, rtol=0, atol=2e-5)
    assert json.loads(json.dumps(result.to_dict()))["logprobs"][0]["token_id"] == result.token_ids[0]


def test_pieces_have_log_probabilities(small):
    result = generate(small, logprobs=1)
    assert [piece.logprob for piece in runtime.stream(small, IDS, **OPTIONS, logprobs=1)] == [*result.logprobs]
    assert all(piece.logprob is None for piece in runtime.stream(small, IDS, **OPTIONS))


def test_a_prompt_alone_has_log_probabilities(small):
    result = generate(small, max_new_tokens=0, prompt_logprobs=0)
    assert not result.token_ids and result.finish_reason == "length" and len(result.prompt_logprobs) == len(IDS)
    assert generate(small, prompt_logprobs=0).prompt_logprobs == result.prompt_logprobs
    assert len(generate(small, [2], max_new_tokens=0, prompt_logprobs=1).prompt_logprobs) == 1
    assert generate(small, max_new_tokens=0).prompt_logprobs is None


def test_a_long_prompts_log_probabilities_hold_up_nobody(small, alone, monkeypatch):
    """A few positions at a time, between the others' steps; the prompt's row moves meanwhile, as another one ends."""
    model, plain, events = dataclasses.replace(small), ScoredPrefill._score, []
    ids = [2, *(9 + (7 * k) % 83 for k in range(199))]
    expected = generate(model, ids, prompt_logprobs=2, logprobs=1, max_new_tokens=4)

    def score(prefill, work):
        events.append("positions")
        return plain(prefill, work)

    def take(answer, token):
        events.append("token")
        return taken(answer, token)

    taken = Answer.take
    monkeypatch.setattr(ScoredPrefill, "_score", score)
    monkeypatch.setattr(Answer, "take", take)
    engine = runtime.Engine(model)
    others = [
        engine.submit(IDS, **OPTIONS | {"max_new_tokens": 90 if name else 9} | CHOICES[name or "greedy"])
        for name in ("", "drawn", "top-p")
    ]
    for other in others:
        next(other)
    scored = engine.submit(ids, **OPTIONS | {"max_new_tokens": 4, "prompt_logprobs": 2, "logprobs": 1})
    pieces = list(scored)
    assert tuple(piece.token_ids[0] for piece in pieces) == expected.token_ids
    assert scored.results[0].prompt_logprobs == expected.prompt_logprobs
    assert scored.results[0].logprobs == expected.logprobs
    slices = [at for at, event in enumerate(events) if event == "positions"]
    assert len(slices) == 13 and all(after - at > 1 for at, after in itertools.pairwise(slices))
    for other, name in zip(others, ("greedy", "drawn", "top-p"), strict=True):
        assert other.close() is None and other.results[0].token_ids[:9] == alone[name][:9]


@pytest.mark.parametrize("reuse", [True, False])
def test_requests_with_the_same_prompt_share_one_run_of_it(small, alone, reuse):
    """Those that wait side by side and may take over what others leave."""
    model = dataclasses.replace(small)
    streams = [
        runtime.Engine(model).submit(IDS, **OPTIONS, **choice, reuse=reuse)
        for choice in (*CHOICES.values(), {"prompt_logprobs": 1}, {"prompt_logprobs": 1}, {"prompt_logprobs": 0})
    ]
    got = [tuple(piece.token_ids[0] for piece in stream) for stream in streams]
    assert got == [*alone.values(), *[alone["greedy"]] * 3]
    cached = [stream.results[0].stats.cached_tokens for stream in streams]
    assert cached == ([0, *[len(IDS)] * 7, 0, len(IDS), 0] if reuse else [0] * 11)
    counts = [len(stream.results[0].prompt_logprobs[1].top) for stream in streams[-3:]]
    assert counts == [1, 1, 0]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("choice", ["greedy", "drawn", "top-p"])
def test_several_answers_are_those_of_successive_seeds(small, rows, choice):
    """From one prefill where there are rows, and the same where there are not."""
    model = dataclasses.replace(small, runtime=dataclasses.replace(small.runtime, max_batch=rows))
    seeds = [CHOICES[choice].get("seed", 0) + copy for copy in range(5)]
    expected = [generate(model, **CHOICES[choice] | {"seed": seed}).token_ids for seed in seeds]
    results = generate(model, n=5, reuse=False, **CHOICES[choice])
    assert [result.token_ids for result in results] == expected
    if rows != 3:  # there others' rows come free at different times
        assert results[0].stats.cached_tokens == {1: 0, 8: 4}[rows] * len(IDS)
    assert [result.seed for result in results] == (seeds if choice != "greedy" else [None] * 5)
    both = generate(model, [IDS, IDS[:7]], n=2, **CHOICES[choice])
    shorter = [generate(model, IDS[:7], **CHOICES[choice] | {"seed": seed}).token_ids for seed in seeds[:2]]
    assert [result.token_ids for result in both] == [*expected[:2], *shorter]
    pieces = runtime.stream(model, [IDS, IDS[:7]], n=2, **OPTIONS | CHOICES[choice])
    assert sorted({piece.index for piece in pieces}) == [0, 1, 2, 3]


def test_one_answer_of_several_is_a_list(small):
    assert len(generate(small, n=1)) == 1
    with pytest.raises(TypeError, match="there is no option n"):
        runtime.generate_many(small, [IDS], "/tmp/never-written", n=2)


def test_processors_get_ids_and_logits_as_transformers_give_them(small, alone):
    seen = []

    def watch(ids, logits):
        seen.append((ids.tolist(), logits.shape, logits.dtype, logits.is_inference()))
        return logits

    result = generate(small, logits_processors=[watch])
    assert result.token_ids == alone["greedy"]
    vocab = small.config.vocab
    assert seen == [([[*IDS, *result.token_ids[:n]]], (1, vocab), torch.float32, False) for n in range(16)]


BAD_PROCESSORS = {
    "of another shape": (
        lambda ids, logits: logits[0],
        ValueError,
        r"logits_processors\[0\] must return .* \(1, \d+\)",
    ),
    "of nothing": (lambda ids, logits: None, TypeError, "must return a tensor of logits, got NoneType"),
    "of integers": (lambda ids, logits: logits.long(), ValueError, "got .* of torch.int64"),
    "that raises": (lambda ids, logits: 1 / 0, ZeroDivisionError, "division by zero"),
    "that bans all": (
        lambda ids, logits: logits - math.inf,
        ValueError,
        "no token can follow .* greatest logit is -inf",
    ),
    "that makes NaNs": (lambda ids, logits: logits * math.nan, ValueError, "greatest logit is nan"),
}


@pytest.mark.parametrize(("processor", "error", "message"), BAD_PROCESSORS.values(), ids=BAD_PROCESSORS.keys())
@pytest.mark.parametrize("after", [0, 3], ids=["at once", "later"])
def test_a_processor_that_fails_ends_its_own_answer(small, alone, processor, error, message, after):
    def late(ids, logits):
        return processor(ids, logits) if ids.shape[1] >= len(IDS) + after else logits

    other = runtime.Engine(small).submit(IDS, **OPTIONS | CHOICES["penalties"])
    failing = runtime.Engine(small).submit(IDS, **OPTIONS, logits_processors=[late])
    pieces = []
    with pytest.raises(error, match=message):
        pieces.extend(failing)
    assert failing.results[0].token_ids == alone["greedy"][:after]
    assert tuple(piece.token_ids[0] for piece in other) == alone["penalties"]
    assert generate(small).token_ids == alone["greedy"]


def test_stop_tokens_of_the_request_end_an_answer(small, alone):
    stop = alone["greedy"][4]
    first = alone["greedy"].index(stop)
    result = generate(small, stop_token_ids=[stop, 1])
    assert (result.token_ids, result.finish_reason) == (alone["greedy"][: first + 1], "stop")
    late = generate(small, stop_token_ids=[stop], min_new_tokens=10)
    assert len(late.token_ids) >= 10 and stop not in late.token_ids[:9]


def test_penalties_and_bias_are_what_they_say(small):
    """A penalty beyond all logits keeps every token from coming twice, from the prompt too where it counts."""
    once = generate(small, presence_penalty=2.0, frequency_penalty=2.0, max_new_tokens=60).token_ids
    assert len(set(once)) > len(set(generate(small, max_new_tokens=60).token_ids))
    assert set(generate(small, logit_bias={7: 1e4}).token_ids) == {7}
    picked = generate(small).token_ids[0]
    assert picked not in generate(small, logit_bias={picked: -math.inf}).token_ids


WHOLE = {
    "temperature": (1, {}),
    "top_p": (1, {"temperature": 1.3, "seed": 11}),
    "min_p": (1, {"temperature": 1.3, "seed": 11}),
    "repetition_penalty": (2, {}),
    "presence_penalty": (1, {}),
    "frequency_penalty": (-1, {}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_is_as_good_as_its_float(small, name):
    number, beside = WHOLE[name]
    beside = {"seed": 3, **beside}
    expected = generate(small, **beside, **{name: float(number)}).token_ids
    for given in (number, np.int64(number), np.float32(number)):
        assert generate(small, **beside, **{name: given}).token_ids == expected
    assert generate(small, logit_bias={5: 4}).token_ids == generate(small, logit_bias={5: 4.0}).token_ids


def test_the_checkpoints_own_processors_hold_unless_the_request_says_otherwise(small, alone):
    config = dataclasses.replace(small.config, processors={"repetition_penalty": 1.3, "suppress_tokens": [9]})
    model = dataclasses.replace(small, config=config)
    plain = generate(model).token_ids
    assert plain == generate(small, repetition_penalty=1.3, logit_bias={9: -math.inf}).token_ids != alone["greedy"]
    assert generate(model, repetition_penalty=1).token_ids == generate(small, logit_bias={9: -math.inf}).token_ids


FORMAT = {"regex": "(ab|cd){3}é"}


def test_an_answer_follows_its_format_and_others_do_not_notice(tiny):
    pytest.importorskip("llguidance", reason="needs the structured extra")
    free = runtime.generate(tiny, "the dog", max_new_tokens=30).token_ids
    alone = runtime.generate(tiny, "the dog", max_new_tokens=30, response_format=FORMAT)
    assert alone.finish_reason == "stop" and alone.text[-1] == "é" and len(alone.text) == 7
    assert set(alone.text[:-1]) <= set("abcd")
    drawn = runtime.generate(tiny, "the dog", response_format=FORMAT, temperature=3.0, n=6, seed=4, max_new_tokens=30)
    assert len({result.text for result in drawn}) > 1
    other = runtime.Engine(tiny).submit("the dog", max_new_tokens=30)
    options = {"max_new_tokens": 30, "response_format": FORMAT, "speculate": "prompt"}
    assert "".join(piece.text for piece in runtime.stream(tiny, "the dog", **options)) == alone.text
    assert tuple(piece.token_ids[0] for piece in other) == free


def test_a_format_needs_a_tokenizer_and_an_end(tiny, small):
    pytest.importorskip("llguidance", reason="needs the structured extra")
    with pytest.raises(ValueError, match=r"response_format needs text, but .* has no tokenizer"):
        runtime.generate(dataclasses.replace(small, tokenizer=None), IDS, response_format=FORMAT)
    with pytest.raises(ValueError, match="ignore_eos must be False with a response_format"):
        runtime.generate(tiny, "the dog", response_format=FORMAT, ignore_eos=True)

"""Speculation: however right or wrong the guesses are, the tokens and the state are those of plain steps."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections import deque
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from runtime.engine import decode
from runtime.engine.answer import Answer
from runtime.engine.decode import stepper
from runtime.engine.drafts import LONGEST_MATCH, Drafts, Match
from runtime.engine.guess_step import GuessStep
from runtime.engine.many import generate_many
from runtime.engine.prefill import prefill
from runtime.engine.request import check_speculation, read_raw_request
from runtime.engine.scheduler import scheduler_of
from runtime.engine.short_chunk import MOST_PICKED
from runtime.engine.speculation import Speculation
from runtime.engine.step_cost import StepCost
from runtime.families.state import new_state
from runtime.kernels.argmax import NO_TOKEN
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.launch import INTERPRETING

MISSING = cpu_calls.missing(torch.float32)
compiled = pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}")
# Those without this mark run where Triton's kernels are interpreted too (tests/test_interpreter.py).
checked = pytest.mark.skipif(bool(MISSING) and not INTERPRETING, reason=f"no kernels that check guesses: {MISSING}")
pytestmark = pytest.mark.usefixtures("one_thread", *(["large_blocks"] if INTERPRETING else []))

STEPS = 44  # three times around the small models' rings
MODELS = {  # by name: family, and what differs from the usual small model
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "gemma3, a window of 4": ("gemma3", {"sliding_window": 4}),  # shorter than a step's rows
}
if INTERPRETING:  # where a step takes a fifth of a second
    FEW = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
    STEPS = 9
    MODELS = {
        "gemma": ("gemma", FEW | {"num_hidden_layers": 1}),
        "gemma2": ("gemma2", FEW | BOTH),
        "gemma3, a window of 4": ("gemma3", FEW | BOTH | {"sliding_window": 4}),
    }


def fresh(model, **limits):
    """The same weights with an engine of their own."""
    return dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, threads=1, **limits))


# Drafts


def matched(ids):
    """What Drafts.match finds, by looking everywhere."""
    for length in range(min(LONGEST_MATCH, len(ids) - 1), 0, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[-length:]:
                return Match(length, end)
    return Match(0, 0)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_guesses_are_what_came_after_the_longest_and_latest_match(data):
    ids = data.draw(st.lists(st.integers(0, data.draw(st.integers(0, 4))), max_size=40))
    told = data.draw(st.integers(0, len(ids)))
    drafts, right, seen = Drafts(ids[:told]), 0, 0
    for end in range(told, len(ids)):
        length, place = drafts.match()
        seen += length > 0
        right += length > 0 and ids[place] == ids[end]
        drafts.extend(ids[end : end + 1])
    assert len(drafts) == len(ids)
    match = drafts.match()
    assert match == matched(ids)
    if match.length:
        text = list(ids)
        for guess in drafts.after(match, 9):  # as if each had come, and the text went on after it
            assert guess == text[match.end + len(text) - len(ids)]
            text.append(guess)
        assert drafts.after(match, 0) == []
    chances = [drafts.chance(length) for length in range(1, LONGEST_MATCH + 3)]
    assert all(0 < chance < 1 for chance in chances)
    untold = [Drafts().chance(length) for length in range(1, LONGEST_MATCH + 3)]
    assert chances == untold if not seen else True
    if seen and right in (0, seen):  # all wrong, or all right: no chance has moved the other way
        assert all((now >= before) if right else (now <= before) for now, before in zip(chances, untold, strict=True))
    at_once = Drafts(ids[:told])
    at_once.extend(ids[told:])
    assert [at_once.chance(length) for length in range(1, LONGEST_MATCH + 3)] == chances


def test_steps_cost_what_they_have_taken():
    cost = StepCost()
    assert not cost.is_known
    assert 1 < cost.of(2) < cost.of(8) < 8
    cost.timed(1, 10.0)
    assert cost.is_known and cost.of(1) == 1
    for seconds in (13.0, 500.0, 12.0, 12.0):
        cost.timed(4, seconds)
    assert cost.of(4) == 1.3
    for _ in range(9):
        cost.timed(2, 1.0)
        cost.timed(3, 1000.0)
    assert (cost.of(2), cost.of(3)) == (1.0, 3.0), "no step of more rows is faster, or slower than as many steps"


# Guesses checked, on a state


class Moment(NamedTuple):
    """A state between two plain steps, whose last token is its first row's."""

    token: int
    position: int
    done: bool
    x: torch.Tensor
    logits: torch.Tensor
    caches: list[torch.Tensor]


def moment(state):
    numbers = int(state.token[0]), int(state.position[0]), bool(state.done[0])
    caches = [cache[0].clone() for cache in (*state.cache.keys, *state.cache.values)]
    return Moment(*numbers, state.x[0].clone(), state.logits[0].clone(), caches)


def assert_same(state, expected, ringed):
    now = moment(state)
    assert now[:3] == expected[:3]
    assert torch.equal(now.x, expected.x) and torch.equal(now.logits, expected.logits)
    for cache, wanted, is_ring in zip(now.caches, expected.caches, ringed * 2, strict=True):
        # A layer with a slot for each position keeps what wrong guesses left there; the next steps overwrite it.
        used = cache.shape[1] if is_ring else expected.position
        assert torch.equal(cache[:, :used], wanted[:, :used])
        assert not INTERPRETING or cache[:, used:].isnan().all(), "on a GPU wrong ones are never stored"


@pytest.fixture(scope="module")
def plain(small_pair):
    """A function that gives a model, a prompt that fills its rings, and every moment of plain decoding."""
    made = {}

    def of(name, dtype):
        if (name, dtype) not in made:
            family, changed = MODELS[name]
            model, ids = fresh(small_pair(family, dtype, **changed).ours), random.Random(0).choices(range(3, 400), k=21)
            state = new_state(model, 1, with_logits=True)
            prefill(model, state, 0, ids)
            step, moments = stepper(model, state), [moment(state)]
            for _ in range(STEPS):
                step()
                moments.append(moment(state))
            made[name, dtype] = model, ids, moments
        return made[name, dtype]

    return of


def wrong_at(at):
    return lambda right, drawn: [(token + 1) % 400 if place == at else token for place, token in enumerate(right)]


def garbage(right, drawn):
    return [drawn.randrange(3, 400) for _ in right]


def right_then_garbage(right, drawn):
    kept = drawn.randrange(len(right) + 1)
    return right[:kept] + garbage(right[kept:], drawn)


KINDS = {
    **{f"wrong at {at}": wrong_at(at) for at in range(MOST_PICKED - 1)},
    "right": lambda right, drawn: right,
    "garbage": garbage,
    "right, then garbage": right_then_garbage,
}
if INTERPRETING:
    KINDS = {kind: KINDS[kind] for kind in ("wrong at 2", "right, then garbage")}


@checked
@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETING else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_checked_guesses_leave_what_plain_steps_leave(name, dtype, plain):
    model, ids, moments = plain(name, dtype)
    picked = [each.token for each in moments]
    ringed = [layer.window is not None for layer in model.config.layers]
    row_most = min(MOST_PICKED, *(layer.slots(256) for layer in model.config.layers)) - 1
    for kind, guessed in KINDS.items():
        state, drawn = new_state(model, MOST_PICKED, with_logits=True), random.Random(kind)
        for cache in (*state.cache.keys, *state.cache.values):
            cache.copy_(torch.full_like(cache, torch.nan))
        prefill(model, state, 0, ids)
        step, speculation = stepper(model, state.first_rows(1)), Speculation(model, state)
        answer, at, lengths = Answer(0, None, STEPS + 1, prompt=ids), 0, []
        answer.take(picked[0])
        while at < STEPS:
            right = picked[at + 1 : at + 1 + drawn.randint(1, row_most)][: STEPS - at - 1]
            if not right or drawn.random() < 0.2:  # plain steps in between
                step()
                tokens = state.first_token()
            else:
                tokens = speculation.check(model, answer, guessed(right, drawn)).tokens
                lengths.append(len(tokens))
            at += len(tokens)
            assert picked[at - len(tokens) + 1 : at + 1] == tokens, kind
            for token in tokens:
                answer.take(token)
            assert_same(state, moments[at], ringed)
        assert lengths and (max(lengths) > 1 or kind in ("garbage", "wrong at 0")), kind
        assert int(state.step[0]) == len(lengths) + STEPS - sum(lengths)


@pytest.fixture(scope="module")
def stepped(small_pair):
    """A model in plain PyTorch, a prompt, and the tokens of plain steps."""
    model, ids = fresh(small_pair("gemma3").ours, eager=True), random.Random(0).choices(range(3, 400), k=21)
    return model, ids, runtime.generate(model, ids, max_new_tokens=12, ignore_eos=True).token_ids


def guess_step(model, ids, stop_ids=()):
    """A step of up to 8 rows after a prompt, in plain PyTorch: what it decides is Triton's too."""
    state = new_state(model, 8, stop_ids=stop_ids)
    first = int(prefill(model, state, 0, ids))
    return state, GuessStep(model, state, 8), answer_of(ids, first)


@pytest.mark.parametrize("count", range(1, 8))
def test_padding_is_no_guess(count, stepped):
    """Even if what it holds would be right; and it has a position that the row will have."""
    model, ids, tokens = stepped
    state, step, answer = guess_step(model, ids)
    step._given[1:] = torch.tensor(tokens[1:8])
    assert step.check(model, answer, [*tokens[1 : count + 1]]).tokens == [*tokens[1 : count + 2]]
    rows = next(rows for rows in step.row_counts if rows > count)
    assert step._rows[rows].position.tolist() == [21 + min(place, count) for place in range(rows)]
    assert int(state.position[0]) == 21 + count + 1 and not state.done[0]
    assert step.check(model, answer, [7]).tokens == [tokens[count + 2]]


@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_stop_token_among_right_guesses_leaves_the_row_done(at, stepped):
    model, ids, tokens = stepped
    assert tokens[at] not in tokens[:at]
    state, step, answer = guess_step(model, ids, stop_ids=[tokens[at]])
    assert step.check(model, answer, [*tokens[1:8]]).tokens == [*tokens[1 : at + 1]]
    assert (int(state.token[0]), int(state.position[0]), bool(state.done[0])) == (tokens[at], 21 + at, True)


@pytest.mark.parametrize(
    ("most", "counts"), [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (5, [2, 4, 5]), (7, [2, 4, 7]), (8, [2, 4, 8])]
)
def test_few_numbers_of_rows_are_captured(most, counts, stepped):
    model = stepped[0]
    assert GuessStep(model, new_state(model, 8), most).row_counts == counts


# Requests


PROMPTS = [[2, *(7 + (5 * i * k) % 90 for k in range(length))] for i, length in enumerate((5, 23, 40), 1)]
TOKENS, MOST_GUESSES = 40, MOST_PICKED - 1
if INTERPRETING:  # where the rows that a model is loaded for are the most of a step
    PROMPTS, TOKENS, MOST_GUESSES = PROMPTS[:2], 13, 4


@pytest.fixture(scope="module")
def small(small_pair):
    return fresh(
        small_pair("gemma3", **(FEW | BOTH if INTERPRETING else {})).ours,
        max_batch=1 + MOST_GUESSES if INTERPRETING else 3,
    )


@pytest.fixture(scope="module")
def answers(small):
    """What plain decoding answers to PROMPTS."""
    return [runtime.generate(fresh(small), ids, max_new_tokens=TOKENS, ignore_eos=True).token_ids for ids in PROMPTS]


def guess_from(known, monkeypatch, wrong_every=5):
    """Lets guesses be those of known answers, as many as can be checked, but for every so many of their tokens.

    Returns:
        The numbers of guesses, step by step.
    """
    counts = []

    def guesses(self, answer, most):
        whole, at = known[tuple(answer.prompt)], len(answer.token_ids)
        drafts = list(whole[at : at + min(most, self._most)])
        wrong = [(token + 1) % 90 if (at + i) % wrong_every == 0 else token for i, token in enumerate(drafts)]
        counts.append(len(wrong))
        return wrong

    monkeypatch.setattr(Speculation, "guesses", guesses)
    return counts


@pytest.fixture
def guessed(answers, monkeypatch):
    return guess_from({tuple(ids): tokens for ids, tokens in zip(PROMPTS, answers, strict=True)}, monkeypatch)


@compiled
@pytest.mark.parametrize("which", range(3))
def test_an_answer_may_end_at_any_length(which, small, answers, guessed):
    model = fresh(small)
    for most in (*range(10), TOKENS):
        result = runtime.generate(model, PROMPTS[which], max_new_tokens=most, ignore_eos=True, speculate="prompt")
        assert result.token_ids == answers[which][:most] and result.finish_reason == "length"
    assert max(guessed) == MOST_PICKED - 1


@checked
def test_an_answer_may_end_with_the_context(small, monkeypatch):
    ids = random.Random(1).choices(range(3, 400), k=small.runtime.max_seq_len - TOKENS)
    options = {"max_new_tokens": TOKENS, "ignore_eos": True}
    expected = runtime.generate(fresh(small), ids, **options).token_ids
    counts = guess_from({tuple(ids): expected}, monkeypatch)
    assert runtime.generate(fresh(small), ids, speculate="prompt", **options).token_ids == expected
    assert max(counts) == MOST_GUESSES


@checked
def test_a_stop_token_among_right_guesses_ends_the_answer(small, answers, guessed):
    for at in (2, 7) if INTERPRETING else (3, 6, 7, 8, 13):
        stop = answers[1][at]
        expected = answers[1][: answers[1].index(stop) + 1]
        model = fresh(small)
        model.config = dataclasses.replace(model.config, stop_token_ids=(stop,))
        result = runtime.generate(model, PROMPTS[1], max_new_tokens=TOKENS, speculate="prompt")
        assert (result.token_ids, result.finish_reason) == (expected, "stop")
        again = runtime.generate(model, PROMPTS[1], max_new_tokens=TOKENS, ignore_eos=True, speculate="prompt")
        assert again.token_ids == answers[1]
    assert max(guessed) == MOST_GUESSES


@compiled
def test_a_stop_string_among_right_guesses_ends_the_answer(tiny, monkeypatch):
    prompt = "A dog and the snow"
    options = {"max_new_tokens": 40, "ignore_eos": True}
    whole = runtime.generate(tiny, prompt, **options)
    guess_from({whole.prompt_token_ids: whole.token_ids}, monkeypatch, wrong_every=11)
    ended = 0
    for start in range(2, len(whole.text) - 2):
        stop = whole.text[start : start + 2]
        expected, result = (
            runtime.generate(tiny, prompt, stop=stop, speculate=speculate, **options) for speculate in (None, "prompt")
        )
        assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
        assert result.finish_reason == expected.finish_reason
        ended += result.finish_reason == "stop" and len(result.token_ids) % MOST_PICKED != 1
    assert ended > 5, "within a run of right guesses"


@compiled
def test_tokens_are_streamed_in_order_and_a_step_counts_once(small, answers, guessed):
    model = fresh(small)
    with runtime.stream(model, PROMPTS[2], max_new_tokens=TOKENS, ignore_eos=True, speculate="prompt") as pieces:
        seen = []
        for piece in pieces:
            assert len(piece.token_ids) == 1
            seen += piece.token_ids
            assert pieces.results[0].token_ids[: len(seen)] == tuple(seen)
    assert tuple(seen) == answers[2]
    stats = pieces.results[0].stats
    assert stats.bytes_per_token < 0.5 * model.plan.bytes_per_token(len(PROMPTS[2]))


class Late:
    """Reads tokens as late as the engine lets it, as where a GPU is ahead of the host."""

    def __init__(self, device, requests, steps, rows):
        self.waiting = deque()

    def request(self, tokens):
        self.waiting.append(list(tokens))

    def take(self):
        return [values.tolist() for values in self.waiting.popleft()]


@compiled
@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_requests_beside_others_decode_plainly(ahead, small, answers, guessed, monkeypatch):
    """And go on speculating once they are alone again, also on a device that is some launches ahead of the host."""
    model = fresh(small, steps_per_graph=4 if ahead == 1 else 1)
    if ahead:
        monkeypatch.setattr(decode, "launches_ahead", lambda model: ahead)
        monkeypatch.setattr(decode, "readback_for", Late)
    options = {"max_new_tokens": TOKENS, "ignore_eos": True}
    first = runtime.stream(model, PROMPTS[0], speculate="prompt", **options)
    got = [next(first).token_ids[0] for _ in range(4)]
    alone = len(guessed)
    second = runtime.stream(model, PROMPTS[1], **{**options, "max_new_tokens": 12})
    assert tuple(piece.token_ids[0] for piece in second) == answers[1][:12]
    together = len(guessed)
    got += [piece.token_ids[0] for piece in first]
    assert tuple(got) == answers[0]
    assert alone and len(guessed) > together
    third = runtime.generate(model, PROMPTS, speculate="prompt", **options)
    assert [result.token_ids for result in third] == answers


@compiled
def test_cancelled_and_interrupted_answers(small, answers, guessed, monkeypatch):
    model, cancel = fresh(small), threading.Event()
    options = {"max_new_tokens": TOKENS, "ignore_eos": True, "speculate": "prompt"}
    with runtime.stream(model, PROMPTS[1], cancel=cancel, **options) as pieces:
        next(pieces)
        next(pieces)
        cancel.set()
        rest = list(pieces)
    assert len(rest) < 2 * MOST_PICKED and pieces.results[0].finish_reason == "cancelled"
    assert pieces.results[0].token_ids == answers[1][: 2 + len(rest)]

    for fails_in in ("keep", "restore"):
        with runtime.stream(model, PROMPTS[2], **options) as pieces:
            got = [next(pieces).token_ids[0]]
            backup = scheduler_of(model)._batch.steps._speculation[False]._step._backup
            with monkeypatch.context() as patch, pytest.raises(MemoryError):

                def fail(*_):
                    raise MemoryError

                patch.setattr(backup, fails_in, fail)
                other = runtime.stream(model, PROMPTS[0], max_new_tokens=1)
                for _ in range(TOKENS):
                    scheduler_of(model).step()
            got += [piece.token_ids[0] for piece in pieces]
            assert tuple(got) == answers[2], fails_in
            other.close()


@compiled
def test_the_next_request_takes_over_what_a_speculating_one_left(small, answers, guessed):
    model, ids = fresh(small, prefill_chunk=16), PROMPTS[2]
    first = runtime.generate(model, ids, max_new_tokens=TOKENS, ignore_eos=True, speculate="prompt")
    following = [*ids, *first.token_ids, 5, 6, 7]
    expected = runtime.generate(fresh(small, prefill_chunk=16), following, max_new_tokens=9, ignore_eos=True)
    result = runtime.generate(model, following, max_new_tokens=9, ignore_eos=True)
    assert result.token_ids == expected.token_ids


@checked
@pytest.mark.parametrize("wrong", [False, True], ids=["in the answer", "in wrong guesses"])
def test_logits_that_are_not_finite(wrong, small, answers, monkeypatch):
    """They end the answer where plain steps end it; those after a wrong guess end nothing."""
    ids, known = PROMPTS[1], answers[1]
    column = 7
    norm, embedding = small.weights.final_norm.clone(), small.weights.embedding.clone()
    norm[column] = -1  # which mutes the column
    healthy = fresh(small)
    healthy.weights = dataclasses.replace(small.weights, final_norm=norm)
    known = runtime.generate(healthy, ids, max_new_tokens=TOKENS, ignore_eos=True).token_ids
    bad = next(token for token in range(3, 90) if token not in {*known, *ids}) if wrong else known[9]
    kept = known.index(bad) + 1 if not wrong else TOKENS
    embedding[bad, column] = torch.finfo(embedding.dtype).max
    model = fresh(small)
    model.weights = dataclasses.replace(healthy.weights, embedding=embedding)
    options = {"max_new_tokens": TOKENS, "ignore_eos": True}
    checks = []

    def guesses(self, answer, most):
        at = len(answer.token_ids)
        right = list(known[at : at + min(most, self._most)])
        checks.append(len(right))
        return [bad if wrong and place == 2 else token for place, token in enumerate(right)]

    monkeypatch.setattr(Speculation, "guesses", guesses)
    for speculate in (None, "prompt"):
        with runtime.stream(model, ids, speculate=speculate, **options) as pieces:
            if wrong:
                assert tuple(piece.token_ids[0] for piece in pieces) == known
                continue
            with pytest.raises(runtime.NonFiniteError, match=f"of token {kept} are not finite"):
                for piece in pieces:
                    assert piece.token_ids[0] != NO_TOKEN
            assert pieces.results[0].token_ids == known[:kept]
    assert max(checks) == MOST_GUESSES


# Answers that choose their tokens from all logits


def no_token_twice(ids, logits):
    return logits.index_fill(1, ids[0], -torch.inf)


CHOICES = {
    "top-k": {"temperature": 1.2, "top_k": 9, "seed": 3},
    "top-p": {"temperature": 0.9, "top_p": 0.8, "seed": 4},
    "min-p": {"temperature": 1.2, "min_p": 0.1, "seed": 5},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "penalties, drawn": {"frequency_penalty": 0.7, "temperature": 0.8, "seed": 6},
    "bias": {"logit_bias": {5: 3.0, 9: -torch.inf}, "min_new_tokens": 9},
    "log probabilities": {"logprobs": 2},
    "a processor": {"logits_processors": [no_token_twice]},
}


@checked
@pytest.mark.parametrize("name", CHOICES)
def test_answers_that_choose_their_tokens_choose_those_of_plain_steps(name, small, monkeypatch):
    options = {"max_new_tokens": TOKENS, "ignore_eos": True} | CHOICES[name]
    plain = runtime.generate(fresh(small), PROMPTS[1], **options)
    counts, model = guess_from({tuple(PROMPTS[1]): plain.token_ids}, monkeypatch), fresh(small)
    result = runtime.generate(model, PROMPTS[1], speculate="prompt", **options)
    assert (result.token_ids, result.logprobs) == (plain.token_ids, plain.logprobs)
    assert max(counts) == MOST_GUESSES and len(counts) < TOKENS / 2
    free = runtime.generate(model, PROMPTS[1], max_new_tokens=4, ignore_eos=True, speculate="prompt")
    assert free.token_ids == runtime.generate(fresh(small), PROMPTS[1], max_new_tokens=4, ignore_eos=True).token_ids


FORMATS = {
    "to its end": ({"regex": "(the|dog|snow|,){12}é"}, {}),
    "drawn": ({"regex": "[a-z ,.]{4,60}"}, {"temperature": 2.5, "seed": 8}),
    "with filters": ({"regex": "([a-c]{3}雪)*A"}, {"temperature": 2.0, "top_k": 30, "seed": 9}),
    "a grammar": ({"grammar": 'start: ("(" start ")" | "T")+ "\\n"'}, {}),
}


@compiled
@pytest.mark.newest_only
@pytest.mark.parametrize("name", FORMATS)
def test_answers_that_follow_a_grammar_have_the_tokens_of_plain_steps(name, tiny, monkeypatch):
    pytest.importorskip("llguidance", reason="needs the structured extra")
    response_format, options = FORMATS[name]
    options = {"max_new_tokens": 60, "response_format": response_format} | options
    plain = runtime.generate(tiny, "A dog and the snow", **options)
    counts = guess_from({plain.prompt_token_ids: (*plain.token_ids, 7)}, monkeypatch, wrong_every=6)
    result = runtime.generate(tiny, "A dog and the snow", speculate="prompt", **options)
    assert (result.token_ids, result.finish_reason) == (plain.token_ids, plain.finish_reason)
    assert max(counts) > 1 and len(counts) < len(plain.token_ids) / 2


@compiled
@pytest.mark.newest_only
@pytest.mark.parametrize("fails_at", [1, 2, 3, 8])
def test_a_choice_that_fails_among_right_guesses_ends_its_answer_there(fails_at, small, answers, guessed):
    calls = []

    def failing(ids, logits):
        calls.append(ids.shape[1] - len(PROMPTS[1]))
        if calls[-1] == fails_at:
            raise LookupError("not this one")
        return logits

    with runtime.stream(
        fresh(small),
        PROMPTS[1],
        max_new_tokens=TOKENS,
        logits_processors=[failing],
        speculate="prompt",
        ignore_eos=True,
    ) as pieces:
        got = []
        with pytest.raises(LookupError, match="not this one"):
            for piece in pieces:
                got += piece.token_ids
    assert tuple(got) == answers[1][:fails_at] and calls == [*range(fails_at + 1)]


# How many guesses


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_prompt_lookup_gives_the_plain_tokens(family, dtype, small_pair, monkeypatch):
    """Whatever pays on this machine: every guess is checked."""
    monkeypatch.setattr(StepCost, "of", lambda cost, rows: 1 + rows / 1e6)
    model = fresh(small_pair(family, dtype).ours)
    picture = random.Random(family).choices(range(3, 40), k=17)
    for prompt in ([2, *picture * 4], [2, *range(5, 60), *range(5, 20)]):
        plain = runtime.generate(model, prompt, max_new_tokens=90, ignore_eos=True)
        speculated = runtime.generate(model, prompt, max_new_tokens=90, ignore_eos=True, speculate="prompt")
        assert speculated.token_ids == plain.token_ids
    assert scheduler_of(model)._batch.steps._speculation[False]._cost._of, "something was checked"


def answer_of(prompt, *new_ids):
    answer = Answer(0, None, 50, prompt=prompt)
    for token in new_ids:
        answer.take(token)
    return answer


@compiled
def test_guesses_are_made_where_they_pay(small):
    speculation = Speculation(small, new_state(small, 1))
    repeating, new = answer_of([1, 2, 3, 4, 5, 6, 7] * 4, 1, 2, 3), answer_of(list(range(60)), 70)
    assert speculation.guesses(repeating, 7) == [], "nothing is known of costs yet"
    speculation._cost.timed(1, 1.0)
    assert speculation.guesses(new, 7) == [], "nothing is repeated"
    assert speculation.guesses(repeating, 7) == [4, 5, 6, 7, 1, 2, 3]
    assert speculation.guesses(repeating, 2) == [4, 5]
    assert speculation.guesses(repeating, 0) == []
    for rows in range(2, 9):
        for _ in range(7):
            speculation._cost.timed(rows, float(rows))
    assert speculation.guesses(repeating, 7) == [], "a row costs a step"


@compiled
@pytest.mark.parametrize("words", [20, 100, 400])
def test_finding_out_that_guesses_are_wrong_costs_little(words, small):
    """Text whose words are picked at random, with all that guesses bring left out."""
    costs, drawn, taken = (1.0, 1.04, 1.2, 1.32, 1.68, 1.88, 2.25, 2.38), random.Random(words), 0.0
    for _ in range(20):
        speculation = Speculation(small, new_state(small, 1))
        for rows, cost in enumerate(costs, 1):
            for _ in range(7):
                speculation._cost.timed(rows, cost)
        answer = Answer(0, None, 99, prompt=drawn.choices(range(words), k=100))
        for _ in range(64):
            answer.take(drawn.randrange(words))
            taken += costs[len(speculation.guesses(answer, 7))]
    assert taken < 1.05 * 20 * 64


@compiled
def test_an_answer_that_begins_anew_is_guessed_at_anew(small):
    speculation = Speculation(small, new_state(small, 1))
    speculation._cost.timed(1, 1.0)
    answer = answer_of([1, 2, 3, 4, 5, 6, 7] * 4, 1, 2, 3)
    assert speculation.guesses(answer, 2) == [4, 5]
    answer.rewind()
    for token in (1, 2):
        answer.take(token)
    assert speculation.guesses(answer, 2) == [3, 4]


# Where it is refused, and where nothing is guessed


@pytest.mark.parametrize("value", ["foo", "", True, 1, ["prompt"]], ids=str)
def test_anything_but_prompt_is_refused(value, small, tmp_path):
    model = fresh(small)
    kind = ValueError if isinstance(value, str) else TypeError
    for call in (
        lambda: runtime.generate(model, [5], speculate=value),
        lambda: runtime.stream(model, [[5], [6]], speculate=value),
        lambda: runtime.Engine(model).submit([5], speculate=value),
        lambda: generate_many(model, [[5]], tmp_path / "out", speculate=value),
    ):
        with pytest.raises(kind) as refusal:
            call()
        assert isinstance(refusal.value, runtime.GemmaRuntimeError)
        assert str(refusal.value) == f'speculate must be "prompt" or None, got {value!r}'
    assert model.engine is None or model.engine.state is None
    assert not (tmp_path / "out").exists()


def test_a_gpu_refuses_where_its_kernels_check_no_guesses():
    raw = read_raw_request([5], speculate="prompt")

    def on_a_gpu(max_batch, heads=4):
        layers, limits = (SimpleNamespace(heads=heads, kv_heads=1),), SimpleNamespace(max_batch=max_batch)
        return SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(layers=layers), runtime=limits)

    for model, reason in ((on_a_gpu(1), "max_batch of at least 2, better 8, got 1"), (on_a_gpu(8, 17), "got 17")):
        with pytest.raises(runtime.InvalidArgument, match=f"speculate must be None .*, got 'prompt': .*{reason}"):
            check_speculation(model, raw)
        check_speculation(model, read_raw_request([5]))
    check_speculation(on_a_gpu(2), raw)


def test_an_eager_model_decodes_plainly(small, answers):
    model = fresh(small, eager=True)
    options = {"max_new_tokens": TOKENS, "ignore_eos": True}
    expected = runtime.generate(model, PROMPTS[0], **options)
    assert runtime.generate(model, PROMPTS[0], speculate="prompt", **options).token_ids == expected.token_ids
    assert not scheduler_of(model)._batch.steps._speculation

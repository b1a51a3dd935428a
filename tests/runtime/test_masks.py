"""Answers that follow a grammar and ask for nothing else: the head picks among the tokens of their masks, those that
they would choose from all logits."""

from __future__ import annotations

import dataclasses
import json
from collections import deque

import pytest

import runtime
from runtime.engine import decode, masks
from runtime.engine.decode import DeviceSteps
from runtime.errors import GrammarTooComplex
from runtime.sampling.grammar import Matcher

pytest.importorskip("llguidance", reason="needs the structured extra")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.newest_only]

PROMPT = "the dog"
FORMATS = {
    "letters": {"regex": "[a-d]{3,25}é"},
    "one of few": {"regex": "(ab|cd){9}雪"},
    "anything but spaces": {"regex": "[^ ]{2,}T"},
    "a schema": {
        "type": "object",
        "properties": {"a": {"enum": ["b", "the dog", None]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    },
}
DRAWN = {"temperature": 2.5, "seed": 11}
OPTIONS = {"max_new_tokens": 24}
FREE = {"greedy": {}, "drawn": DRAWN | {"seed": 5}}


def untouched(ids, logits):
    return logits


class Late:
    """Reads tokens as late as the engine lets it, as where a GPU is ahead of the host."""

    def __init__(self, device, requests, steps, rows):
        self.waiting = deque()

    def request(self, tokens):
        self.waiting.append(list(tokens))

    def take(self):
        return [values.tolist() for values in self.waiting.popleft()]


@pytest.fixture(params=["compiled", "eager", "ahead of the host"])
def model(tiny, request, monkeypatch):
    """One with three rows."""
    if request.param.startswith("ahead"):
        monkeypatch.setattr(decode, "launches_ahead", lambda model: 4)
        monkeypatch.setattr(decode, "readback_for", Late)
    limits = dataclasses.replace(tiny.runtime, eager=request.param == "eager", max_batch=3)
    return dataclasses.replace(tiny, runtime=limits)


def test_the_heads_picks_are_those_from_all_logits(model, monkeypatch):
    """Alone, and among others that end and begin at all times, some of them without a grammar."""
    asked = {
        (name, way): {"response_format": response_format} | choice
        for name, response_format in FORMATS.items()
        for way, choice in FREE.items()
    }
    expected = {
        what: runtime.generate(model, PROMPT, **OPTIONS, **choice, logits_processors=[untouched])
        for what, choice in asked.items()
    }
    free = {way: runtime.generate(model, PROMPT, **OPTIONS, **choice).token_ids for way, choice in FREE.items()}
    assert len({result.token_ids for result in expected.values()}) == len(asked)
    monkeypatch.setattr(DeviceSteps, "choose", None)  # no step writes logits
    for what, choice in asked.items():
        result = runtime.generate(model, PROMPT, **OPTIONS, **choice)
        assert (result.token_ids, result.finish_reason) == (expected[what].token_ids, expected[what].finish_reason)
    for order in (1, -1):
        engine = runtime.Engine(model)
        streams = []
        for what, choice in [*asked.items()][::order]:
            streams.append((expected[what].token_ids, engine.submit(PROMPT, **OPTIONS, **choice)))
            streams += [(free[what[1]], engine.submit(PROMPT, **OPTIONS, **FREE[what[1]]))]
        for tokens, stream in streams:
            assert tuple(piece.token_ids[0] for piece in stream) == tokens


def test_beside_an_answer_that_chooses_from_logits_they_are_the_same(model):
    """Those steps leave logits, and an answer may go from one kind of step to the other and back."""
    choice = {"response_format": FORMATS["letters"]} | DRAWN
    alone = runtime.generate(model, PROMPT, **OPTIONS, **choice).token_ids
    engine = runtime.Engine(model)
    masked = engine.submit(PROMPT, **OPTIONS, **choice)
    got = [next(masked).token_ids[0] for _ in range(3)]
    runtime.generate(model, PROMPT, max_new_tokens=5, logprobs=1)
    got += [piece.token_ids[0] for piece in masked]
    assert tuple(got) == alone


def test_the_host_reads_a_token_and_fills_the_mask_while_the_device_runs_the_layers(tiny, monkeypatch):
    events, plain = [], {name: getattr(decode, name) for name in ("_layers", "_pick")}

    def watched(what, function):
        def call(*arguments, **options):
            events.append(what)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(decode, "launches_ahead", lambda model: 4)
    monkeypatch.setattr(decode, "readback_for", Late)
    monkeypatch.setattr(decode, "_layers", watched("layers", plain["_layers"]))
    monkeypatch.setattr(decode, "_pick", watched("head", plain["_pick"]))
    monkeypatch.setattr(Late, "take", watched("token", Late.take))
    monkeypatch.setattr(masks.Masks, "fill", watched("mask", masks.Masks.fill))
    model = dataclasses.replace(tiny, runtime=dataclasses.replace(tiny.runtime, eager=True))
    result = runtime.generate(model, PROMPT, max_new_tokens=6, response_format=FORMATS["one of few"])
    assert len(result.token_ids) == 6
    assert events == ["layers", "token", "mask", "head"] * 5 + ["token"]


def test_a_grammar_that_fails_ends_its_own_answer(model, monkeypatch):
    free = runtime.generate(model, PROMPT, **OPTIONS).token_ids
    choice = {"response_format": FORMATS["one of few"]}
    expected = runtime.generate(model, PROMPT, **OPTIONS, **choice).token_ids
    accept, calls = Matcher.accept, []

    def failing(matcher, token):
        calls.append(token)
        if len(calls) == 5:
            raise GrammarTooComplex("too complex")
        accept(matcher, token)

    monkeypatch.setattr(Matcher, "accept", failing)
    other, fails = (runtime.Engine(model).submit(PROMPT, **OPTIONS, **more) for more in ({}, choice))
    got = []
    with pytest.raises(GrammarTooComplex):
        for piece in fails:
            got += piece.token_ids
    assert tuple(got) == fails.results[0].token_ids == expected[:4]
    assert tuple(piece.token_ids[0] for piece in other) == free


def test_of_many_prompts_one_whose_grammar_fails_fails_alone(model, monkeypatch, tmp_path):
    options = OPTIONS | {"response_format": FORMATS["one of few"]}
    expected = list(runtime.generate(model, PROMPT, **options).token_ids)
    accept, failed = Matcher.accept, []

    def failing(matcher, token):
        if token == expected[2] and not failed:
            failed.append(matcher)
            raise GrammarTooComplex("too complex")
        accept(matcher, token)

    monkeypatch.setattr(Matcher, "accept", failing)
    out = tmp_path / "answers.jsonl"
    assert runtime.generate_many(model, [PROMPT] * 5, out, **options) == 5
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("error") for line in lines].count("too complex") == 1
    assert [line["token_ids"] for line in lines if "error" not in line] == [expected] * 4


def test_an_answer_cut_short_follows_its_grammar_again(model, monkeypatch):
    choice = {"response_format": FORMATS["a schema"]} | DRAWN
    expected = runtime.generate(model, PROMPT, **OPTIONS, **choice).token_ids
    plain, calls = DeviceSteps.mask, []

    def interrupted(device, *arguments):
        plain(device, *arguments)
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(DeviceSteps, "mask", interrupted)
    stream = runtime.Engine(model).submit(PROMPT, **OPTIONS, **choice)
    with pytest.raises(KeyboardInterrupt):
        runtime.generate(model, PROMPT, **OPTIONS)
    assert tuple(piece.token_ids[0] for piece in stream) == expected and len(calls) > 4

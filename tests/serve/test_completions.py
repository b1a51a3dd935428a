"""`/v1/completions` against `generate`."""

from __future__ import annotations

import json

import pytest

import runtime

from .conftest import events

pytestmark = pytest.mark.newest_only

PROMPT = "the dog"


def complete(client, **body):
    response = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 12, **body})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client, **body):
    response = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 12, "stream": True, **body})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *said, last = events(response.text)
    assert last == "[DONE]"
    return said


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_eos": True},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.5, "seed": 2**64 - 1, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5},
        {"stop_token_ids": [288], "skip_special_tokens": False},
        {"stop": ["y", "zz"]},
        {"speculate": "prompt", "reuse": False},
    ],
    ids=lambda options: ",".join(options) or "none",
)
def test_answers_are_those_of_generate(client, model, options):
    expected = runtime.generate(model, PROMPT, max_new_tokens=12, **options)
    choice = complete(client, return_token_ids=True, **options)["choices"][0]
    assert tuple(choice["token_ids"]) == expected.token_ids
    assert tuple(choice["prompt_token_ids"]) == expected.prompt_token_ids
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    said = streamed(client, return_token_ids=True, **options)
    assert "".join(part["choices"][0]["text"] for part in said) == expected.text
    assert tuple(token for part in said for token in part["choices"][0]["token_ids"]) == expected.token_ids
    assert [part["choices"][0]["finish_reason"] for part in said][-1] == expected.finish_reason


def test_names_that_differ_reach_the_engine(client, model):
    expected = runtime.generate(model, PROMPT, max_new_tokens=12, min_new_tokens=9, logit_bias={5: 50.0, 288: -100.0})
    body = {"min_tokens": 9, "logit_bias": {"5": 50, "288": -100}, "return_token_ids": True}
    assert tuple(complete(client, **body)["choices"][0]["token_ids"]) == expected.token_ids
    assert expected.token_ids[9] == 5, "the bias ends the answer as soon as it may end"


def test_prompts_and_answers_have_their_places(client, model):
    prompts = [PROMPT, "A", "snow on the dog"]
    expected = runtime.generate(model, prompts, n=2, max_new_tokens=5, temperature=1.0, seed=7)
    body = {"prompt": prompts, "n": 2, "max_tokens": 5, "temperature": 1, "seed": 7}
    answer = complete(client, **body)
    assert [choice["text"] for choice in answer["choices"]] == [result.text for result in expected]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    prompt_tokens = sum(len(result.prompt_token_ids) for result in expected[::2])
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    assert answer["usage"]["completion_tokens"] == sum(len(result.token_ids) for result in expected)
    texts = [""] * 6
    for part in streamed(client, **body):
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert texts == [result.text for result in expected]


@pytest.mark.parametrize("prompt", [[2, 283, 271], [[2, 283, 271], [2, 268]]])
def test_ids_are_prompts(client, model, prompt):
    expected = runtime.generate(model, prompt, max_new_tokens=4, n=1)
    choices = complete(client, prompt=prompt, max_tokens=4)["choices"]
    assert [choice["text"] for choice in choices] == [result.text for result in expected]


def test_usage_comes_last_in_a_stream_that_asks_for_it(client):
    assert all("usage" not in part for part in streamed(client))
    *parts, last = streamed(client, stream_options={"include_usage": True})
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == [] and last["usage"] == complete(client)["usage"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [part["usage"]["completion_tokens"] for part in streamed(client, stream_options=options)]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == last["usage"]["completion_tokens"]


def test_cached_tokens_are_counted(tool_client):
    body = {"prompt": "the dog and the snow, " * 5, "max_tokens": 1, "n": 2}
    usages = [complete(tool_client, **body, reuse=reuse)["usage"] for reuse in (True, True, False)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 64, 0]
    assert [usage["prompt_tokens"] for usage in usages] == [111] * 3


def test_log_probabilities(client, model):
    expected = runtime.generate(model, PROMPT, max_new_tokens=12, logprobs=2)
    logprobs = complete(client, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [one.logprob for one in expected.logprobs]
    assert [list(top.values()) for top in logprobs["top_logprobs"]] == [
        [value for _, value in one.top] for one in expected.logprobs
    ]
    assert logprobs["text_offset"][0] == 0
    parts = [part["choices"][0]["logprobs"] for part in streamed(client, logprobs=2)[:-1]]
    for key, column in logprobs.items():
        assert [value for part in parts for value in part[key]] == column


def test_a_byte_that_is_no_text_is_spelled(client):
    logprobs = complete(client, max_tokens=1, logit_bias={"200": 100}, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [r"bytes:\xc2"] and logprobs["top_logprobs"] == [None]


def test_echo_gives_the_prompt_and_its_log_probabilities(client, model):
    expected = runtime.generate(model, PROMPT, max_new_tokens=1, logprobs=1, prompt_logprobs=1)
    choice = complete(client, max_tokens=1, echo=True, logprobs=1)["choices"][0]
    assert choice["text"] == PROMPT + expected.text
    known = [None, *(one.logprob for one in (*expected.prompt_logprobs[1:], *expected.logprobs))]
    assert choice["logprobs"]["token_logprobs"] == known
    assert choice["logprobs"]["tokens"] == ["<bos>", *PROMPT, *expected.text]
    assert choice["logprobs"]["text_offset"] == [0, *range(len(PROMPT) + 1)]
    assert complete(client, max_tokens=0, echo=True)["choices"][0]["text"] == PROMPT


def test_answers_follow_a_schema(client):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    text = complete(client, response_format=wanted, max_tokens=40)["choices"][0]["text"]
    assert json.loads(text).keys() == {"a"}
    assert complete(client, response_format={"regex": "[ab]{3}"})["choices"][0]["text"].strip("ab") == ""


def test_without_a_length_there_are_16_tokens(client):
    response = client.post("/v1/completions", json={"prompt": PROMPT, "ignore_eos": True})
    assert response.json()["usage"]["completion_tokens"] == 16

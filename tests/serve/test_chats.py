"""`/v1/chat/completions` against `chat`."""

from __future__ import annotations

import pytest

import runtime

from .conftest import events

pytestmark = pytest.mark.newest_only

TALK = [{"role": "user", "content": "the dog"}]


def chat(client, **body):
    response = client.post("/v1/chat/completions", json={"messages": TALK, **body})
    assert response.status_code == 200, response.text
    return response.json()


def deltas(client, **body):
    response = client.post("/v1/chat/completions", json={"messages": TALK, "stream": True, **body})
    *said, last = events(response.text)
    assert last == "[DONE]"
    return said


def test_an_answer_is_that_of_chat(client, model):
    expected = runtime.chat(model, TALK, max_new_tokens=20, temperature=1.0, seed=5)
    body = {"max_completion_tokens": 20, "temperature": 1, "seed": 5, "return_token_ids": True}
    answer = chat(client, **body)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert (tuple(choice["token_ids"]), choice["finish_reason"]) == (expected.token_ids, expected.finish_reason)
    assert tuple(answer["prompt_token_ids"]) == expected.prompt_token_ids
    said = [part["choices"][0] for part in deltas(client, **body)]
    assert said[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["delta"].get("content", "") for part in said) == expected.text
    assert tuple(token for part in said for token in part.get("token_ids", ())) == expected.token_ids
    assert [part["finish_reason"] for part in said][-2:] == [None, expected.finish_reason]


def test_without_a_length_an_answer_may_fill_the_context(client):
    usage = chat(client, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == 128


def test_parts_are_joined_and_developers_are_systems(client, model):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]
    asked = [{"role": "developer", "content": "A"}, {"role": "user", "content": parts}]
    meant = [{"role": "system", "content": "A"}, {"role": "user", "content": "the dog"}]
    text = chat(client, messages=asked, max_tokens=8)["choices"][0]["message"]["content"]
    assert text == runtime.chat(model, meant, max_new_tokens=8).text


def test_an_answer_can_be_sent_back(client):
    message = {**chat(client, max_tokens=4)["choices"][0]["message"], "refusal": None, "annotations": []}
    assert chat(client, messages=[*TALK, message, TALK[0]], max_tokens=4)


def test_log_probabilities(client, model):
    expected = runtime.chat(model, TALK, max_new_tokens=6, logprobs=2)
    body = {"max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    content = chat(client, **body)["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [one.logprob for one in expected.logprobs]
    for one, known in zip(content, expected.logprobs, strict=True):
        token_bytes = model.tokenizer.bytes_of(known.token_id)
        assert bytes(one["bytes"]) == token_bytes and one["token"] == token_bytes.decode(errors="replace")
        assert [top["logprob"] for top in one["top_logprobs"]] == [value for _, value in known.top]
    parts = [part["choices"][0]["logprobs"] for part in deltas(client, **body)]
    assert [one for part in parts if part for one in part["content"]] == content


def test_several_answers(client, model):
    expected = runtime.chat(model, TALK, max_new_tokens=6, n=3, temperature=1.0, seed=1)
    body = {"max_tokens": 6, "n": 3, "temperature": 1, "seed": 1}
    answer = chat(client, **body)
    assert [choice["message"]["content"] for choice in answer["choices"]] == [result.text for result in expected]
    texts = [""] * 3
    *parts, last = deltas(client, **body, stream_options={"include_usage": True})
    for part in parts:
        texts[part["choices"][0]["index"]] += part["choices"][0]["delta"].get("content", "")
    assert texts == [result.text for result in expected]
    assert last["usage"] == answer["usage"]


@pytest.mark.parametrize("part", ["image_url", "input_audio", "file", "video_url"])
def test_nothing_but_text_is_opened(client, part):
    content = [{"type": "text", "text": "?"}, {"type": part, part: {"url": "file:///etc/passwd"}}]
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert "reads text only" in error["message"] and part in error["message"]
    assert error["param"] == "messages[0].content[1]"

"""The `openai` package against a server on a socket."""

from __future__ import annotations

import asyncio
import json

import openai
import pydantic
import pytest

import runtime

from .conftest import NAME, listening

pytestmark = pytest.mark.newest_only
TALK = [{"role": "user", "content": "go"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "turn",
        "parameters": {"type": "object", "properties": {"left": {"type": "boolean"}}, "required": ["left"]},
    },
}


class Answer(pydantic.BaseModel):
    yes: bool


@pytest.fixture(scope="module")
def server(tool_model):
    with listening(tool_model, api_key="secret") as server:
        yield server


def options(server, **changes):
    return {"base_url": f"http://127.0.0.1:{server.port}/v1", "api_key": "secret", "max_retries": 0, **changes}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(**options(server)) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "gemma-runtime"


def test_completions(client, tool_model):
    expected = runtime.generate(tool_model, "the dog", max_new_tokens=9, temperature=1.0, seed=4, logprobs=1)
    asked = {"model": NAME, "prompt": "the dog", "max_tokens": 9, "temperature": 1, "seed": 4, "logprobs": 1}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected.text
    assert whole.choices[0].logprobs.token_logprobs == [one.logprob for one in expected.logprobs]
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    parts = list(client.completions.create(**asked, stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected.text


def test_chats(client, tool_model):
    expected = runtime.chat(tool_model, TALK, max_new_tokens=9, top_k=5, temperature=1.0, seed=4)
    asked = {"model": NAME, "messages": TALK, "max_completion_tokens": 9, "temperature": 1, "seed": 4}
    asked["extra_body"] = {"top_k": 5}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected.text
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as events:
        for _ in events:
            pass
        final = events.get_final_completion()
    assert final.choices[0].message.content == expected.text
    assert final.usage == whole.usage
    back = client.chat.completions.create(model=NAME, messages=[*TALK, whole.choices[0].message, *TALK], max_tokens=2)
    assert back.choices[0].finish_reason


def test_structured_output(client):
    parsed = client.chat.completions.parse(model=NAME, messages=TALK, response_format=Answer, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "turn"}}], ids=str)
def test_tools(client, choice):
    asked = {"model": NAME, "messages": TALK, "tools": [TOOL], "tool_choice": choice, "max_tokens": 120}
    (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert call.function.name == "turn" and json.loads(call.function.arguments).keys() == {"left"}
    with client.chat.completions.stream(**asked) as events:
        for _ in events:
            pass
        (streamed,) = events.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments


def test_many_at_once_with_asyncio(server, tool_model):
    expected = [
        runtime.generate(tool_model, "the dog", max_new_tokens=9, temperature=1.0, seed=seed) for seed in range(12)
    ]

    async def ask(client, seed):
        asked = {"model": NAME, "prompt": "the dog", "max_tokens": 9, "temperature": 1, "seed": seed}
        if seed % 2:
            return (await client.completions.create(**asked)).choices[0].text
        return "".join([part.choices[0].text async for part in await client.completions.create(**asked, stream=True)])

    async def ask_all():
        async with openai.AsyncOpenAI(**options(server)) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(12)))

    assert asyncio.run(ask_all()) == [result.text for result in expected]


def test_leaving_a_stream_early(client, server):
    for part in client.completions.create(model=NAME, prompt="the dog", max_tokens=200, stream=True):
        part.choices[0]
        break
    assert client.completions.create(model=NAME, prompt="the dog", max_tokens=2).choices[0].text is not None


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (openai.NotFoundError, {"model": "gpt-4"}),
        (openai.BadRequestError, {"max_tokens": 10_000}),
        (openai.BadRequestError, {"extra_body": {"best_of": 3}}),
        (openai.AuthenticationError, {"extra_headers": {"Authorization": "Bearer x"}}),
    ],
)
def test_errors_are_those_of_the_package(client, error, changes):
    with pytest.raises(error) as raised:
        client.completions.create(**{"model": NAME, "prompt": "the dog", "max_tokens": 2} | changes)
    assert raised.value.body["message"] and raised.value.request_id

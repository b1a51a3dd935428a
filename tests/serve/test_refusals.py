"""What is refused, and how: OpenAI's shape whatever goes wrong, and nothing of a server's inside."""

from __future__ import annotations

import json

import pytest

from runtime.errors import NonFiniteError
from runtime.serve.service import Service

from .conftest import refused

pytestmark = pytest.mark.newest_only

GOOD = {"prompt": "the dog", "max_tokens": 4}
TALK = {"messages": [{"role": "user", "content": "the dog"}]}
CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
NAN_CALL = {"id": "1", "function": {"name": "f", "arguments": '{"a": NaN}'}}


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"frobnicate": 1}, "frobnicate", "no field frobnicate"),
        ({"": 1}, "", "no field ''"),
        ({"A\ud800": 1}, None, "no field here whose name is not valid Unicode"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": []}, "prompt", "got []"),
        ({"prompt": [[]]}, "prompt[0]", "got []"),
        ({"prompt": [2, -1]}, "prompt[1]", "got -1"),
        ({"prompt": [2, 10**6]}, "prompt", "prompt[1] must be from 0 to 298, got 1000000"),
        ({"prompt": "a\ud800"}, "prompt", "unicode"),
        ({"prompt": None}, "prompt", "got None"),
        ({"temperature": -1}, "temperature", "got -1"),
        ({"temperature": "hot"}, "temperature", "got 'hot'"),
        ({"temperature": True}, "temperature", "got True"),
        ({"max_tokens": 1.5}, "max_tokens", "got 1.5"),
        ({"max_tokens": 200}, "max_tokens", "context of 128 tokens together, got 8 + 200"),
        ({"min_tokens": 5}, "min_tokens", "at most max_tokens = 4, got 5"),
        ({"n": 0}, "n", "got 0"),
        ({"n": 69}, "n", "at most 68 answers"),
        ({"best_of": 2}, "best_of", "got 2"),
        ({"suffix": "x"}, "suffix", "got 'x'"),
        ({"echo": True, "stream": True}, "echo", "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "no field"),
        ({"logprobs": 21}, "logprobs", "got 21"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "got 'x'"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "got 999"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "got 101"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", "got '05'"),
        ({"stop": [""]}, "stop", "empty"),
        ({"seed": 2**64}, "seed", "got 18446744073709551616"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"response_format": {"regex": "("}}, "response_format", "regex"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos", "False"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "no field"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_body_that_cannot_be_kept(client, change, param, says):
    body = json.dumps(GOOD | change)
    error = refused(client.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)
    assert says in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize("long", [{"f" * 10**6: 1}, {"model": "m" * 10**6}, {"stop": "e" * 10**6, "seed": "s" * 10**6}])
def test_no_refusal_repeats_all_of_a_long_text(client, long):
    response = client.post("/v1/completions", json=GOOD | long)
    refused(response, 404 if "model" in long else 400)
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "picture": 1}]}, "messages[0].picture"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_completion_tokens": 120}, "max_tokens"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"modalities": []}, "modalities"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [NAN_CALL]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"store": True}, "store"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_chat_that_cannot_be_kept(client, change, param):
    assert refused(client.post("/v1/chat/completions", json=TALK | change), 400)["param"] == param


@pytest.mark.parametrize("content", ["", "[]", "1", "null"])
def test_what_is_no_json_object(client, content):
    headers = {"content-type": "application/json"}
    error = refused(client.post("/v1/completions", content=content, headers=headers), 400)
    assert error["message"].startswith("the body must be a JSON object")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"{'a': 1}",
        b"\x00",
        b'{"prompt": "a"} x',
        b'{"prompt": "\xe9"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "response_format": {"const": -Infinity}}',
        b'{"prompt": "a", "response_format": {"const": 1e999}}',
        b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda content: content[:50].decode(errors="replace"),
)
def test_what_is_no_json(client, content):
    error = refused(client.post("/v1/completions", content=content, headers={"content-type": "application/json"}), 400)
    assert error["code"] == "invalid_json" and error["message"].startswith("the body must be JSON: ")


def test_the_key(serve):
    with serve(api_key="sésame") as client:
        for given in (
            {},
            {"authorization": "Bearer"},
            {"authorization": "Bearer x"},
            {"authorization": "Basic sésame"},
        ):
            headers = {name: value.encode() for name, value in given.items()}
            response = client.post("/v1/completions", json=GOOD, headers=headers)
            assert refused(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics").status_code == client.get("/v1/nothing").status_code == 401
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        headers = {"authorization": "Bearer sésame".encode()}
        assert client.post("/v1/completions", json=GOOD, headers=headers).status_code == 200


def test_web_pages_of_other_origins(serve, client):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with serve(cors_origins=("https://a.example",), api_key="k") as open_client:
        allowed = open_client.options("/v1/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = open_client.options("/v1/completions", headers=asked | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        refusal = open_client.post("/v1/completions", json=GOOD, headers={"origin": "https://a.example"})
        assert refusal.status_code == 401 and refusal.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in client.post("/v1/completions", json=GOOD, headers=asked).headers


def test_a_fault_of_our_own_shows_nothing_of_it(client, monkeypatch, caplog):
    def fails(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Service, "_stream", fails)
    error = refused(client.post("/v1/completions", json=GOOD), 500)
    assert "secret" not in error["message"] and error["type"] == "server_error"
    assert "ZeroDivisionError: secret" in caplog.text
    assert client.app.state.service.admission.answers == 0
    monkeypatch.undo()
    assert client.post("/v1/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_a_step_that_fails_ends_requests_and_not_the_server(client, model, monkeypatch, streams):
    from runtime.engine.scheduler import scheduler_of

    def fails(*_):
        raise NonFiniteError("too large") if streams else RuntimeError("secret")

    monkeypatch.setattr(scheduler_of(model)._device, "launch", fails)
    response = client.post("/v1/completions", json=GOOD | {"stream": streams, "ignore_eos": True})
    if streams:
        error = json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))["error"]
        assert (error["message"], error["code"]) == ("too large", "non_finite")
    else:
        assert "secret" not in refused(response, 500)["message"]
    monkeypatch.undo()
    assert client.post("/v1/completions", json=GOOD).status_code == 200
    assert client.app.state.service.admission.answers == client.app.state.service.admission.responses == 0


def test_a_request_that_takes_too_long(serve, steps):
    steps.seconds = 0.05
    with serve(timeout_s=0.2) as client:
        assert refused(client.post("/v1/completions", json=GOOD | {"max_tokens": 100, "ignore_eos": True}), 504)["code"]
        assert client.post("/v1/completions", json=GOOD | {"max_tokens": 1}).status_code == 200


def test_no_error_of_the_schema_is_promised_that_never_comes(client):
    document = client.get("/openapi.json").json()
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["anyOf"][0]["enum"] == [
        "tiny",
        "other",
    ]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["responses"].keys() <= {"200", "4XX", "5XX"}, path
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404

"""The page at `/` and what it asks for, without a browser; test_browser.py has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runtime.inspection.attention import attention_weights
from runtime.serve import web_page
from runtime.serve.inspector import MOST_TOKENS

from .conftest import events
from .test_refusals import refused

pytestmark = pytest.mark.newest_only

IDS = [2, *range(262, 282)]


def test_the_page_allows_nothing_from_elsewhere(client):
    for path in web_page.PATHS:
        response = client.get(path)
        assert response.status_code == 200 and response.content
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert policy.pop("img-src") == "data:"
        assert set(policy.values()) == {"'self'", "'none'"} and policy["default-src"] == "'none'"
        assert response.headers["x-content-type-options"] == "nosniff"
        addresses = re.findall(r"https?://[^\s'\"]+", response.text)
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, "a namespace, which nothing is loaded from"
        assert client.head(path).headers["content-length"] == response.headers["content-length"]


def test_the_page_needs_no_exception_from_its_policy(client):
    page = client.get("/").text
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script(.*?)>(.*?)</script>", page, re.DOTALL) == [(' type="module" src="inspector.js"', "")]


def test_every_file_that_is_named_is_served_as_what_it_is(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:href|src)="([\w.]+)"', page.text))
    for path in web_page.PATHS:
        if path.endswith(".js"):
            response = client.get(path)
            assert response.headers["content-type"] == "text/javascript; charset=utf-8"
            named |= set(re.findall(r'from "\./([\w.]+)"', response.text))
    assert {f"/{name}" for name in named} | {"/"} == set(web_page.PATHS)
    shared = Path(web_page.frame.HERE, "style.css").read_text()
    assert client.get("/style.css").text == shared, "the report pages' style"


def test_a_key_is_for_what_the_page_asks(serve):
    with serve(api_key="secret") as client:
        assert {client.get(path).status_code for path in web_page.PATHS} == {200}
        body = {"tokens": IDS, "layer": 0, "head": 0}
        refused(client.get("/inspect"), 401)
        refused(client.post("/inspect/attention", json=body), 401)
        headers = {"Authorization": "Bearer secret"}
        assert client.get("/inspect", headers=headers).status_code == 200
        assert client.post("/inspect/attention", json=body, headers=headers).status_code == 200


def test_facts(client, model):
    facts = client.get("/inspect").json()
    assert facts["model"] == "tiny" and facts["family"] == "Gemma 3" and facts["dtype"] == "float32"
    assert facts["parameters"] == model.weights.parameters and facts["max_model_len"] == 128
    assert facts["layers"] == [{"heads": 4, "window": 16}, {"heads": 4, "window": None}, {"heads": 4, "window": 16}]
    assert facts["has_chat_template"] and facts["max_attention_tokens"] == MOST_TOKENS


@pytest.mark.parametrize(("layer", "head"), [(0, 3), (1, 0), (2, 2)])
def test_attention(client, model, layer, head):
    answer = client.post("/inspect/attention", json={"tokens": IDS, "layer": layer, "head": head}).json()
    assert (answer["layer"], answer["head"]) == (layer, head)
    assert answer["window"] == model.config.layers[layer].window
    expected = attention_weights(model, IDS, layer, head).tolist()
    assert [len(row) for row in answer["weights"]] == list(range(1, len(IDS) + 1))
    for row, (given, wanted) in enumerate(zip(answer["weights"], expected, strict=True)):
        assert given == [round(weight, 4) for weight in wanted[: row + 1]]


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"layer": 3}, "layer", "from 0 to 2, got 3"),
        ({"head": 4}, "head", "from 0 to 3, got 4"),
        ({"head": -1}, "head", "got -1"),
        ({"tokens": []}, "tokens", "at least 1"),
        ({"tokens": [2, 299]}, "tokens", "from 0 to 298, got 299"),
        ({"tokens": [2] * 129}, "tokens", "context of 128 tokens, got 129"),
        ({"tokens": [2] * (MOST_TOKENS + 1)}, "tokens", f"at most {MOST_TOKENS}"),
        ({"tokens": "the dog"}, "tokens", "got 'the dog'"),
        ({"top_k": 5}, "top_k", "no field"),
    ],
)
def test_attention_that_there_is_not(client, change, param, says):
    error = refused(client.post("/inspect/attention", json={"tokens": IDS, "layer": 0, "head": 0} | change), 400)
    assert error["param"] == param and says in error["message"]


def test_attention_is_admitted_like_any_request(serve):
    body = {"tokens": IDS, "layer": 0, "head": 0}
    with serve(max_queue=0) as client:
        assert refused(client.post("/inspect/attention", json=body | {"model": "nobody"}), 404)["param"] == "model"
        admission = client.app.state.service.admission
        admission.answers += admission.most
        assert refused(client.post("/inspect/attention", json=body), 429)["code"] == "queue_full"
        admission.answers -= admission.most
        assert client.post("/inspect/attention", json=body).status_code == 200
        assert not admission.answers and not admission.responses
        admission.is_draining = True
        assert refused(client.post("/inspect/attention", json=body), 503)["code"] == "shutting_down"


def test_ids_of_the_likeliest_tokens(client, model):
    """What the page shows of a prompt, and what it goes on with."""
    asked = {"prompt": "the dog", "max_tokens": 3, "logprobs": 4, "return_token_ids": True, "ignore_eos": True}
    whole = client.post("/v1/completions", json=asked | {"echo": True}).json()["choices"][0]
    ids, logprobs = [*whole["prompt_token_ids"], *whole["token_ids"]], whole["logprobs"]
    assert logprobs["top_token_ids"][0] is None and len(logprobs["top_token_ids"]) == len(ids)
    for token, spelled, top, named in zip(
        ids[1:], logprobs["tokens"][1:], logprobs["top_logprobs"][1:], logprobs["top_token_ids"][1:], strict=True
    ):
        assert named.keys() == top.keys() and len(named) == 4
        assert named.get(spelled, token) == token
        assert all(client.post("/detokenize", json={"tokens": [each]}).status_code == 200 for each in named.values())
    streamed = events(client.post("/v1/completions", json=asked | {"stream": True}).text)
    columns = [event["choices"][0]["logprobs"] for event in streamed if event != "[DONE]"]
    assert [one["top_token_ids"][0] for one in columns if one] == logprobs["top_token_ids"][-3:]
    plain = client.post("/v1/completions", json=asked | {"return_token_ids": False}).json()["choices"][0]
    assert "top_token_ids" not in plain["logprobs"]


def test_the_schema_has_what_the_page_asks_for_and_not_the_page(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert paths.keys() >= {"/inspect", "/inspect/attention"} and not paths.keys() & set(web_page.PATHS)

"""Tools: what the template is told, calls that are forced, and calls told from text."""

from __future__ import annotations

import json

import pytest

from runtime.serve.call_format import CallFormat
from runtime.serve.call_reader import CallReader
from runtime.serve.json_notation import JsonNotation

from .conftest import events, read_in_pieces

pytestmark = pytest.mark.newest_only

TALK = [{"role": "user", "content": "go"}]
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/bit"}},
    "required": ["a"],
    "$defs": {"bit": {"enum": ["0", "1"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "?", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stay"}},
]
PARAMETERS_AT = "tools[0].function.parameters"
FORMAT = CallFormat(JsonNotation("name", "arguments"), "<tool_call>", "</tool_call>", False)
CALL = '<tool_call>{"name": "f", "arguments": {"a": "}"}}</tool_call>'


def ask(client, **body):
    return client.post("/v1/chat/completions", json={"messages": TALK, "tools": TOOLS, "max_tokens": 120, **body})


def test_a_template_defines_how_calls_look(tool_client):
    assert tool_client.app.state.service.call_format == FORMAT


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"f", "stay"}), ({"type": "function", "function": {"name": "f"}}, {"f"})],
    ids=["required", "named"],
)
def test_a_forced_call_fits_its_schema(tool_client, choice, names):
    response = ask(tool_client, tool_choice=choice, temperature=1, seed=1)
    (answer,) = response.json()["choices"]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None), response.text
    (call,) = answer["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] in names
    arguments = json.loads(call["function"]["arguments"])
    assert arguments == {} if call["function"]["name"] == "stay" else arguments["a"] in ("0", "1")
    streamed = ask(tool_client, tool_choice=choice, temperature=1, seed=1, stream=True)
    said = [part["choices"][0] for part in events(streamed.text)[:-1]]
    (delta,) = [part["delta"]["tool_calls"][0] for part in said if "tool_calls" in part["delta"]]
    assert (delta["index"], delta["function"]) == (0, call["function"])
    assert said[-1]["finish_reason"] == "tool_calls"
    assert not "".join(part["delta"].get("content") or "" for part in said)


@pytest.mark.parametrize("schema", ["anyOf", "$ref"])
def test_the_arguments_of_a_forced_call_are_an_object_whatever_else_the_schema_allows(tool_client, schema):
    bit = {"type": "object", "properties": {"a": {"enum": ["0", "1"]}}, "required": ["a"]}
    either = {"anyOf": [{"const": "x"}, {"$ref": "#/$defs/bit"}], "$defs": {"bit": bit}}
    function = {
        "name": "f",
        "parameters": either if schema == "anyOf" else {"$ref": "#/$defs/bit", "$defs": {"bit": bit}},
    }
    response = ask(tool_client, tools=[{"type": "function", "function": function}], tool_choice="required")
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["a"] in ("0", "1")


def test_a_call_and_its_outcome_can_be_sent_back(tool_client):
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "0"}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    talk = [*TALK, said, {"role": "tool", "tool_call_id": "call_1", "content": "x"}]
    answer = ask(tool_client, messages=talk, max_tokens=1, return_token_ids=True)
    text = tool_client.app.state.service.tokenizer.decode(answer.json()["prompt_token_ids"], False)
    assert text.startswith("<bos>f stay <start_of_turn>user\ngo<end_of_turn>")
    assert 'model\n<tool_call>{"name": "f", "arguments": {"a": "0"}}</tool_call><end_of_turn>' in text


def test_calls_are_told_from_text_that_nobody_forced(tool_client):
    grammar = f'start: "so " {json.dumps(CALL)} {json.dumps(CALL.replace("}", "0", 1))}'
    response = ask(
        tool_client, response_format={"grammar": grammar}, max_tokens=200, messages=[{"role": "user", "content": "x"}]
    )
    message = response.json()["choices"][0]["message"]
    assert message["content"].startswith("so"), response.text
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": "}"}


def test_none_shows_the_model_no_tools(tool_client):
    answer = ask(tool_client, tool_choice="none", max_tokens=1, return_token_ids=True).json()
    without = ask(tool_client, tools=None, max_tokens=1, return_token_ids=True).json()
    assert answer["prompt_token_ids"] == without["prompt_token_ids"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": None, "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, PARAMETERS_AT),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": ["object", "null"]}}}]},
            PARAMETERS_AT,
        ),
        ({"functions": []}, "functions"),
    ],
)
def test_what_cannot_be_kept_is_refused(tool_client, body, param):
    response = ask(tool_client, **body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_a_schema_that_cannot_be_enforced_is_refused_where_a_call_is_forced(tool_client):
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    response = ask(tool_client, tools=[{"type": "function", "function": function}], tool_choice="required")
    assert response.status_code == 400 and "cannot" in response.json()["error"]["message"]


def test_a_template_without_tools_is_named(client):
    error = ask(client).json()["error"]
    assert (error["param"], error["message"]) == ("tools", "this model's chat template takes no tools")


def read(text, size, names=("f", "g"), most=None, format=FORMAT):
    return read_in_pieces(CallReader(format, names, most), text, size)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("no call <tool", "no call <tool", 0),
        (CALL, "", 1),
        (f"so {CALL}", "so ", 1),
        (f"{CALL}\n{CALL} done", "done", 2),
        ('<tool_call>{"name": "h", "arguments": {}}</tool_call>', None, 0),
        ('<tool_call>{"name": "f", "arguments": []}</tool_call>', None, 0),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, 0),
        ('<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', None, 0),
        ('<tool_call>{"name": "f", "argum', None, 0),
        (CALL.removesuffix("</tool_call>"), "", 1),
        (CALL.removesuffix("call>"), "", 1),
    ],
)
def test_reading_calls(text, said, calls, size):
    read_text, read_calls = read(text, size)
    assert read_text == (text if said is None else said)
    assert read_calls == [("f", '{"a": "}"}')] * calls


def test_no_more_calls_are_read_than_are_wanted():
    assert read(CALL + CALL, 3, most=1) == (CALL, [("f", '{"a": "}"}')])


def test_calls_that_are_bare_objects():
    bare = CallFormat(JsonNotation("name", "parameters"), "", "", False)
    assert read('{"name": "g", "parameters": {}}', 4, format=bare) == ("", [("g", "{}")])
    assert read('{"x": 1}', 4, format=bare) == ('{"x": 1}', [])

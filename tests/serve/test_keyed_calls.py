"""Calls in FunctionGemma's notation: what of a template shows it, what is read as one, and what stays text."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil

import pytest
import torch

from runtime import generation
from runtime.serve.call_format import CallFormat, call_format
from runtime.serve.call_reader import CallReader
from runtime.serve.error import ApiError
from runtime.serve.keyed_notation import KeyedNotation
from runtime.text.tokenizer import Tokenizer

from .conftest import events, read_in_pieces, serving

pytestmark = pytest.mark.newest_only

TEMPLATE = """
{%- macro written(value) -%}
{%- if value is string -%}<escape>{{ value }}<escape>
{%- elif value is boolean -%}{{ 'true' if value else 'false' }}
{%- elif value is mapping -%}{ {%- for key, one in value | dictsort -%}
{{ key }}:{{ written(one) }}{{ ',' if not loop.last }}{%- endfor -%} }
{%- elif value is iterable -%}[{%- for one in value -%}{{ written(one) }}{{ ',' if not loop.last }}{%- endfor -%}]
{%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{{ bos_token }}{% for tool in tools or [] %}declaration:{{ tool.function.name }} {% endfor %}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ '<start_function_response>response:' + message.name + written({'value': message.content}) }}
{{- '<end_function_response>' }}
{%- else -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + message.content }}
{%- for call in message.tool_calls or [] -%}
{{ '<start_function_call>call:' + call.function.name + written(call.function.arguments) + '<end_function_call>' }}
{%- endfor -%}
{{ '<end_of_turn>\n' }}
{%- endif -%}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
SPECIAL = {
    "é": "<escape>",
    "雪": "<start_function_call>",
    "▁snow": "<end_function_call>",
}  # in place of tokens that are there
NOTATION = KeyedNotation("<escape>", ("true", "false", "None"))
FORMAT = CallFormat(NOTATION, "<start_function_call>call:", "<end_function_call>", True)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TALK = [{"role": "user", "content": "go"}]


@pytest.fixture(scope="module")
def folder(tool_folder, tmp_path_factory):
    """The tiny model with that template, and with its marks as special tokens."""
    folder = shutil.copytree(tool_folder, tmp_path_factory.mktemp("keyed") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    for piece, special in SPECIAL.items():
        vocab[special] = vocab.pop(piece)
        entry = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": vocab[special], "content": special, "special": True, **entry})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def client(folder):
    from runtime.api import load

    model = load(folder, device="cpu", max_seq_len=256, max_batch=4, progress=False)
    with serving(dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, prefill_chunk=64))) as client:
        yield client


def ask(client, **body):
    return client.post("/v1/chat/completions", json={"messages": TALK, "tools": TOOLS, "max_tokens": 120, **body})


def test_a_template_shows_the_notation(client):
    assert client.app.state.service.call_format == FORMAT


@pytest.mark.parametrize(
    ("change", "into"),
    [
        ("<escape>{{ value }}<escape>", "{{ value }}"),
        ("'true' if value else 'false'", "'yes:' if value else 'no:'"),
        ("{{ key }}:", "{{ key }}="),
        ("'<start_function_call>call:' +", ""),
    ],
)
def test_a_template_that_writes_something_else_is_refused(folder, change, into):
    tokenizer = Tokenizer.from_folder(folder, 299)
    assert change in TEMPLATE
    tokenizer._chat_template = TEMPLATE.replace(change, into)
    with pytest.raises(ApiError, match="in a form that this server does not read"):
        call_format(tokenizer, ())


def read(text, size):
    said, calls = read_in_pieces(CallReader(FORMAT, ("f", "g")), text, size)
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


def call(arguments, name="f"):
    return f"<start_function_call>call:{name}{arguments}<end_function_call>"


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("{}", {}),
        ("{a:<escape>x, y}:{<escape>}", {"a": "x, y}:{"}),
        ("{a:<escape><escape>,b:<escape>two\nlines<escape>}", {"a": "", "b": "two\nlines"}),
        ("{a:1,b:-1.5e3,c:true,d:false,e:None}", {"a": 1, "b": -1500.0, "c": True, "d": False, "e": None}),
        ("{a:[],b:[1,<escape>]<escape>,[2]],c:{}}", {"a": [], "b": [1, "]", [2]], "c": {}}),
        ("{a:{b:{c-1:<escape>雪<escape>}}}", {"a": {"b": {"c-1": "雪"}}}),
    ],
)
def test_values_are_read(written, arguments, size):
    assert read(f"so {call(written)}", size) == ("so ", [("f", arguments)])
    assert read(call(written) + call("{}", "g"), size) == ("", [("f", arguments), ("g", {})])


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "written",
    [
        "",
        "{",
        "{a}",
        "{a:}",
        "{a:x}",
        "{a:1,}",
        "{a:1 b:2}",
        "{,}",
        "{:1}",
        "{ a:1}",
        "{a: <escape>x<escape>}",
        "{a:<escape>x}",
        "{a:<escape>x<escape>y}",
        "{<escape>a<escape>:1}",
        "{a:1,a:2}",
        "{a:01}",
        "{a:NaN}",
        "{a:1e999}",
        "{a:null}",
        "{a:True}",
        '{a:"x"}',
        "{a:[1,]}",
        "{a:[1}",
        "{a:{b:1}",
        "{a:" + "[" * 5000 + "}",
        '{"a": 1}',
        "(a:1)",
    ],
)
def test_what_is_malformed_stays_text(written, size):
    assert read(call(written), size) == (call(written), [])


def test_other_functions_and_unfinished_calls_stay_text():
    assert read(call("{}", "h"), 7) == (call("{}", "h"), [])
    assert read("<start_function_call>call:f{a:<escape>x", 3) == ("<start_function_call>call:f{a:<escape>x", [])
    assert read("call:f{}", 2) == ("call:f{}", [])


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_the_model(client, stream, monkeypatch):
    """Its quotes are special tokens, which are no text anywhere else."""
    tokenizer = client.app.state.service.tokenizer
    wanted = [*tokenizer.encode("so " + call("{a:<escape>}<escape>,b:2}"), add_special_tokens=False), 1]
    begin, generate = len(tokenizer.apply_chat(TALK, TOOLS)), generation.stream

    def write(ids, logits):
        return torch.full_like(logits, -math.inf).index_fill(1, torch.tensor([wanted[ids.shape[1] - begin]]), 0.0)

    monkeypatch.setattr(generation, "stream", functools.partial(generate, logits_processors=[write]))
    response = ask(client, stream=stream)
    assert response.status_code == 200, response.text
    if not stream:
        (answer,) = response.json()["choices"]
        assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", "so")
        (called,) = answer["message"]["tool_calls"]
    else:
        deltas = [part["choices"][0]["delta"] for part in events(response.text)[:-1]]
        ((called,),) = (delta["tool_calls"] for delta in deltas if "tool_calls" in delta)
        assert "".join(delta.get("content") or "" for delta in deltas) == "so "
    assert called["function"] == {"name": "f", "arguments": '{"a": "}", "b": 2}'}


def test_a_call_and_what_it_returned_can_be_sent_back(client):
    """OpenAI's API has the name with the call alone, and the template wants it with what was returned."""
    called = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"b": [1, null], "a": "x"}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [called]}
    talk = [*TALK, said, {"role": "tool", "tool_call_id": "call_1", "content": "y"}]
    answer = ask(client, messages=talk, max_tokens=1, return_token_ids=True)
    text = client.app.state.service.tokenizer.decode(answer.json()["prompt_token_ids"], False)
    assert "<start_function_call>call:f{a:<escape>x<escape>,b:[1,None]}<end_function_call>" in text
    assert "<start_function_response>response:f{value:<escape>y<escape>}<end_function_response>" in text
    unknown = ask(client, messages=[*TALK, {"role": "tool", "tool_call_id": "call_2", "content": "y"}])
    assert unknown.status_code == 400 and "the chat template refuses" in unknown.json()["error"]["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}], ids=str)
def test_no_call_is_forced(client, choice):
    error = ask(client, tool_choice=choice).json()["error"]
    assert (error["param"], error["code"]) == ("tool_choice", "unsupported_parameter")

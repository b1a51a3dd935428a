"""A conversation as text: the checkpoint's chat template, rendered as in transformers, within limits.

A template is a program that comes with the weights. It runs in jinja2's sandbox with the functions that transformers
provides and no others, and with limited time and memory. Does not import transformers, which takes a second.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from runtime.errors import InvalidArgument, InvalidArgumentType, one_line
from runtime.text.template_limits import LimitedEnvironment

_NOT_TEXT = {"image", "image_url", "audio", "audio_url", "input_audio", "video", "video_url"}
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the standard one first


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    named: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    begins_turn: bool = True,
) -> str:
    """The text of a conversation, the beginning of the model's turn included.

    Args:
        template: Jinja source.
        messages: the conversation, at least one message; each usually with a "role" and a "content", which is text or
            a list of items of type "text".
        named: the special tokens by name, as variables of the template.
        tools: what the model may call, as JSON schemas; None for nothing.
        begins_turn: whether the model's turn follows.

    Raises:
        InvalidArgumentType: `messages` is not a list of mappings.
        InvalidArgument: the conversation is empty or is not only text, or the template raises or exceeds its limits.
    """
    conversation = _checked(messages)
    variables = {"tools": None if tools is None else _plain(tools), "documents": None}
    try:
        environment, compiled, lock = _compiled(template)
        with lock:
            environment.start()
            return compiled.render(named, messages=conversation, add_generation_prompt=begins_turn, **variables)
    except Exception as error:  # a template is a program and may raise anything
        raise InvalidArgument(f"the chat template refuses these messages: {one_line(error)}") from error


def takes_tools(template: str) -> bool:
    """Whether a template looks at the tools that it is given."""
    return "tools" in meta.find_undeclared_variables(_compiled(template)[0].parse(template))


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages as the template sees them: plain data, without the caller's objects."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise InvalidArgumentType(f"messages must be a list of mappings with 'role' and 'content', got {messages!r}")
    if not messages:
        raise InvalidArgument("messages must hold at least one message, got none")
    for message in messages:
        content = message.get("content")
        for item in content if isinstance(content, (list, tuple)) else ():
            item_type = item.get("type") if isinstance(item, Mapping) else None
            if isinstance(item_type, str) and item_type in _NOT_TEXT:
                raise InvalidArgument(f"this runtime reads text only, got an item of type {item_type!r} in a message")
    conversation = [_plain(message) for message in messages]
    # As in the installed transformers.
    if _transformers_version() >= (5, 23):
        conversation = [{key: value for key, value in message.items() if value is not None} for message in conversation]
    if _transformers_version() >= (5, 21):
        conversation = [_with_reasoning(message) for message in conversation]
    return conversation


@functools.cache
def _transformers_version() -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy of JSON's types only, since a template may call any method of its values."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for plain in (str, int, float):
        if isinstance(value, plain):
            return getattr(plain, f"__{plain.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    raise InvalidArgumentType(f"messages must hold text, numbers, lists and mappings, got {type(value).__name__}")


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> tuple[LimitedEnvironment, jinja2.Template, threading.Lock]:
    """A compiled template and its lock: one rendering at a time, since the environment counts what it uses."""
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.set_filter("tojson", _tojson)
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace}
    return environment, environment.from_string(template), threading.Lock()


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for training: renders its content."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Any) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that begin with an underscore."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args  # a template may pass `self=`
        attributes = dict(*rest, **attributes)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)  # type: ignore[arg-type]

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace's names must not begin with an underscore, got {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

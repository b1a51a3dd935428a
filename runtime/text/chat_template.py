"""A conversation as text: a checkpoint's chat template, rendered as transformers renders it and within limits.

A template is a program that came with the weights. It runs in jinja2's sandbox with what transformers gives it and
nothing else, and may spend so much time and memory and no more: every loop, call, filter and operation that can make
something large is counted. Rendering needs no transformers, whose import takes a second.
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
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.text.template_limits import LimitedEnvironment

_NOT_TEXT = {"image", "image_url", "audio", "audio_url", "input_audio", "video", "video_url"}
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the first of them the standard one


def render(template: str, messages: Sequence[Mapping[str, Any]], named: Mapping[str, str]) -> str:
    """The text of a conversation, the beginning of the model's turn included.

    Args:
        template: Jinja source.
        messages: the conversation, at least one message; each usually with a "role" and a "content", which is text or
            a list of parts of type "text".
        named: the special tokens by their names, as the template may use them.

    Raises:
        InvalidArgumentType: `messages` is not a list of mappings.
        InvalidArgument: the conversation is empty or holds more than text, or the template raises or passes its limits.
    """
    conversation = _checked(messages)
    try:
        environment, compiled, lock = _compiled(template)
        with lock:
            environment.start()
            return compiled.render(named, messages=conversation, tools=None, documents=None, add_generation_prompt=True)
    except Exception as error:  # a template is a program: whatever it raises is its refusal
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise InvalidArgument(f"the chat template refuses these messages: {reason}") from error


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages as the template sees them: plain data, nothing of the caller's own objects."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise InvalidArgumentType(f"messages must be a list of mappings with 'role' and 'content', got {messages!r}")
    if not messages:
        raise InvalidArgument("messages must hold at least one message, got none")
    for message in messages:
        parts = message.get("content")
        for part in parts if isinstance(parts, (list, tuple)) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind in _NOT_TEXT:
                raise InvalidArgument(f"this runtime reads text only, got a part of type {kind!r} in a message")
    conversation = [_plain(message) for message in messages]
    # What a template sees depends on the installed transformers.
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
    """A copy made of JSON's types alone: a template may call any method of what it sees."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    raise InvalidArgumentType(f"messages must hold text, numbers, lists and mappings, got {type(value).__name__}")


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> tuple[LimitedEnvironment, jinja2.Template, threading.Lock]:
    """A template ready to run, one rendering at a time: its environment keeps the account of what it spends."""
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.set_filter("tojson", _tojson)
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace}
    return environment, environment.from_string(template), threading.Lock()


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training, and shows what it encloses."""

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
        self, *rest = args  # so that a template's own `self=` is an attribute like any other
        attributes = dict(*rest, **attributes)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)  # type: ignore[arg-type]

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no names with a leading underscore, got {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

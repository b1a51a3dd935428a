"""Tools that a model may call: what a request says of them, and how its chat template writes a call.

A template defines how calls look. So a call is put into it, and what comes out around the call's JSON object is what
calls begin and end with; a template that writes no JSON object has no form that is read here.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.sampling.response_format import ResponseFormat, read_response_format
from runtime.serve.error import ApiError
from runtime.serve.message import FunctionCall, ToolCall
from runtime.serve.options import Body
from runtime.text.tokenizer import Tokenizer

_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class Function(Body):
    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: str


class ChosenTool(Body):
    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Literal["none", "auto", "required"] | ChosenTool


@dataclass(frozen=True)
class CallFormat:
    """How a chat template writes a call: a JSON object of a name and arguments between two texts.

    Args:
        begin, end: the texts; either may be empty.
        name, arguments: the object's keys.
        has_special_tokens: whether special tokens are among the texts.
    """

    begin: str
    end: str
    name: str
    arguments: str
    has_special_tokens: bool

    def forced(self, functions: Sequence[Function]) -> ResponseFormat:
        """What an answer must be that is one call of one of these.

        Raises:
            ValueError, TypeError: a function's parameters are no schema that can be enforced.
        """
        alone = len(functions) == 1
        calls = [
            self._schema(function, "#" if alone else f"#/anyOf/{index}") for index, function in enumerate(functions)
        ]
        schema = calls[0] if alone else {"anyOf": calls}
        wanted = read_response_format({"type": "json_schema", "json_schema": {"schema": schema}})
        assert wanted is not None
        return wanted.between(self.begin, self.end)

    def _schema(self, function: Function, at: str) -> dict[str, Any]:
        parameters = function.parameters or {"type": "object", "properties": {}}
        return {
            "type": "object",
            "properties": {
                self.name: {"const": function.name},
                self.arguments: _moved(parameters, f"{at}/properties/{self.arguments}"),
            },
            "required": [self.name, self.arguments],
        }

    def read(self, text: str) -> tuple[str, str, int] | None:
        """The call whose object a text begins with: name, arguments and where the object ends; None for no such."""
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.keys() != {self.name, self.arguments}:
            return None
        name, arguments = value[self.name], value[self.arguments]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return name, json.dumps(arguments, ensure_ascii=False), end


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references into itself hold where it has been put into another."""
    if isinstance(schema, list):
        return [_moved(part, to) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: to + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, to)
        for key, value in schema.items()
    }


_PROBE = ("probed_function", {"probed": "value"})


def call_format(tokenizer: Tokenizer, stop_ids: Collection[int]) -> CallFormat:
    """How a model's chat template writes calls.

    Args:
        tokenizer: the model's.
        stop_ids: the tokens that end a turn.

    Raises:
        ApiError: it takes no tools, or writes calls in another form.
    """
    if not tokenizer.takes_tools:
        raise ApiError(400, "this model's chat template takes no tools", param="tools", code="unsupported_parameter")
    turn = _turn_with_a_call(tokenizer)
    for at in (index for index, character in enumerate(turn) if character == "{"):
        try:
            value, length = json.JSONDecoder().raw_decode(turn[at:])
        except ValueError:
            continue
        keys = {json.dumps(item): key for key, item in value.items()}
        if keys.keys() == {json.dumps(part) for part in _PROBE}:
            begin, end = turn[:at].lstrip(), turn[at + length :]
            for stop in filter(None, (_text_of(tokenizer, token) for token in stop_ids)):
                end = end.partition(stop)[0]
            name, arguments = (keys[json.dumps(part)] for part in _PROBE)
            specials = filter(None, (_text_of(tokenizer, token) for token in tokenizer.special_ids))
            return CallFormat(begin, end.rstrip(), name, arguments, any(text in begin + end for text in specials))
    raise ApiError(
        400,
        "this model's chat template takes tools but writes calls in a form that this server does not read: expected a "
        "JSON object of a name and arguments",
        param="tools",
        code="unsupported_parameter",
    )


def _turn_with_a_call(tokenizer: Tokenizer) -> str:
    """What the template makes of a turn of the model's that is one call; nothing where it refuses one."""
    name, arguments = _PROBE
    tools = [
        {"type": "function", "function": {"name": name, "description": "?", "parameters": {"type": "object"}}},
    ]
    user = {"role": "user", "content": "?"}
    call = {"id": "call00000", "type": "function", "function": {"name": name, "arguments": arguments}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        before = tokenizer.render_chat([user], tools)
        whole = tokenizer.render_chat([user, said], tools, begins_turn=False)
        return whole.removeprefix(before) if whole.startswith(before) else ""
    except (InvalidArgument, InvalidArgumentType):
        return ""


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    return (tokenizer.bytes_of(token) or b"").decode(errors="replace")


class CallReader:
    """Tells the calls in an answer from its text, as both come.

    Args:
        format: how calls are written.
        names: of the functions that there are; anything else is text.
        most: how many calls are read; what follows them is text.
    """

    def __init__(self, format: CallFormat, names: Collection[str], most: int | None = None) -> None:
        self._format, self._names, self._left = format, names, most
        self._opening = format.begin or "{"
        self._buffer = ""
        self._ends = False  # a call has just been read, and its last text may follow

    def push(self, text: str) -> Iterator[str | ToolCall]:
        """Takes more of the answer, and gives what is certain by now."""
        self._buffer += text
        while True:
            if self._ends and not self._skip_end():
                return
            at = -1 if self._left == 0 else self._buffer.find(self._opening)
            if at < 0:
                held = 0 if self._left == 0 else _overlap(self._buffer, self._opening)
                said, self._buffer = self._buffer[: len(self._buffer) - held], self._buffer[len(self._buffer) - held :]
                if said:
                    yield said
                return
            if at:
                yield self._buffer[:at]
                self._buffer = self._buffer[at:]
            if "}" not in text or (found := self._format.read(self._buffer[len(self._format.begin) :])) is None:
                return
            name, arguments, length = found
            if name not in self._names:
                return
            self._buffer, self._ends = self._buffer[len(self._format.begin) + length :], True
            if self._left is not None:
                self._left -= 1
            yield ToolCall(
                id=f"call_{uuid.uuid4().hex}", type="function", function=FunctionCall(name=name, arguments=arguments)
            )

    def finish(self) -> str:
        """What is left at the end of the answer and is no call."""
        left, self._buffer = self._buffer, ""
        return "" if self._ends and self._format.end.startswith(left.lstrip()) else left

    def _skip_end(self) -> bool:
        """Leaves out what ends a call and the blanks around it; says whether something else has come."""
        rest = self._buffer.lstrip()
        if self._format.end.startswith(rest):
            return False
        self._buffer = rest.removeprefix(self._format.end).lstrip()
        self._ends = not self._buffer
        return not self._ends


def _overlap(text: str, opening: str) -> int:
    """How many of the last characters of a text may be the beginning of an opening."""
    return next((size for size in range(len(opening) - 1, 0, -1) if text.endswith(opening[:size])), 0)

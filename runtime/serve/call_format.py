"""How a chat template writes a tool call.

Only the template defines how calls look. So a probe call is rendered with it, and the text around that call is what
calls begin and end with. A template that writes it in none of the notations known here is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.sampling.response_format import ResponseFormat
from runtime.serve.error import ApiError
from runtime.serve.json_notation import JsonNotation
from runtime.serve.keyed_notation import KeyedNotation
from runtime.serve.tool import Function
from runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class CallFormat:
    """A tool call in some notation, with the text before and after it.

    Args:
        notation: of the call itself.
        begin, end: the texts before and after; either may be empty.
        has_special_tokens: whether any of this contains special tokens.
    """

    notation: JsonNotation | KeyedNotation
    begin: str
    end: str
    has_special_tokens: bool

    def forced(self, functions: Sequence[Function]) -> ResponseFormat:
        """The format of an answer that is exactly one call of one of these functions.

        Raises:
            ApiError: calls in this notation cannot be enforced.
            ValueError, TypeError: a function's parameters are not a schema that can be enforced.
        """
        return self.notation.forced(functions).between(self.begin, self.end)


# Values of every kind that arguments may have; the keys are in order, since some templates sort them.
_NAME = "probed_function"
_ARGUMENTS = {
    "a_yes": True,
    "b_no": False,
    "c_nothing": None,
    "d_text": "value",
    "e_list": ["value", -1.5, {"key": "value"}],
    "f_object": {"inner": [7, []], "other": {}},
}


def call_format(tokenizer: Tokenizer, stop_ids: Collection[int]) -> CallFormat:
    """How a model's chat template writes calls.

    Args:
        tokenizer: the model's.
        stop_ids: the tokens that end a turn.

    Raises:
        ApiError: the template takes no tools, or writes calls in a form that is not known here.
    """
    if not tokenizer.takes_tools:
        raise ApiError(400, "this model's chat template takes no tools", param="tools", code="unsupported_parameter")
    turn = _turn_with_a_call(tokenizer)
    for kind in (JsonNotation, KeyedNotation):
        if (found := kind.found_in(turn, _NAME, _ARGUMENTS)) is not None:
            notation, at, after = found
            begin, end = turn[:at].lstrip(), turn[after:]
            for stop in filter(None, (_text_of(tokenizer, token) for token in stop_ids)):
                end = end.partition(stop)[0]
            specials = [text for token in tokenizer.special_ids if (text := _text_of(tokenizer, token))]
            written = turn[turn.index(begin) : after] + end
            return CallFormat(notation, begin, end.rstrip(), any(text in written for text in specials))
    raise ApiError(
        400,
        "this model's chat template takes tools but writes calls in a form that this server does not read: expected a "
        "JSON object of a name and arguments, or name{key:value}",
        param="tools",
        code="unsupported_parameter",
    )


def _turn_with_a_call(tokenizer: Tokenizer) -> str:
    """The template's text for a model turn that is a single call; empty where it refuses one."""
    function = {"name": _NAME, "description": "?", "parameters": {"type": "object"}}
    user = {"role": "user", "content": "?"}
    call = {"id": "call00000", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = [{"type": "function", "function": function}]
    try:
        before = tokenizer.render_chat([user], tools)
        whole = tokenizer.render_chat([user, said], tools, begins_turn=False)
        return whole.removeprefix(before) if whole.startswith(before) else ""
    except (InvalidArgument, InvalidArgumentType):
        return ""


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    return (tokenizer.bytes_of(token) or b"").decode(errors="replace")

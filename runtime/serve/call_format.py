"""How a chat template writes a call of a tool.

A template defines how calls look. So a call is put into it, and what comes out around the call is what calls begin and
end with; a template that writes a call in none of the notations that are known here has no form that is read.
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
    """A call in some notation, between two texts.

    Args:
        notation: of the call itself.
        begin, end: the texts; either may be empty.
        has_special_tokens: whether special tokens are in any of this.
    """

    notation: JsonNotation | KeyedNotation
    begin: str
    end: str
    has_special_tokens: bool

    def forced(self, functions: Sequence[Function]) -> ResponseFormat:
        """What an answer must be that is one call of one of these.

        Raises:
            ApiError: there is no such thing in this notation.
            ValueError, TypeError: a function's parameters are no schema that can be enforced.
        """
        return self.notation.forced(functions).between(self.begin, self.end)


# Of every kind that arguments may have, in the order of their keys, which some templates sort.
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
        ApiError: it takes no tools, or writes calls in another form.
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
    """What the template makes of a turn of the model's that is one call; nothing where it refuses one."""
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

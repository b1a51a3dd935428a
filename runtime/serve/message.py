"""A conversation's messages, as OpenAI's API gives them and as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from runtime.serve.error import ApiError
from runtime.serve.options import Body
from runtime.serve.strict_json import read_json


class TextPart(Body):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"this server reads text only, got a part of type {kind!r:.40}")
        return value


class FunctionCall(Body):
    name: str
    arguments: str = Field(description="A JSON object.")


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Fields of an earlier answer that clients send back empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self, where: str, functions: Mapping[str, str]) -> dict[str, Any]:
        """The message as transformers' templates expect it: text in one piece, arguments as an object, and in a tool's
        result the name of the function, which some templates need and OpenAI's API leaves out.

        Args:
            where: its place in the request, for error messages.
            functions: names of the functions called in the conversation, by call id.

        Raises:
            ApiError: it has no content, a field that belongs to another role, or arguments that are not an object.
        """
        content = self.content
        for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) and self.role != role:
                message = f"{where}.{field} must be left out in a message of the role {self.role}: the {role}'s have it"
                raise ApiError(400, message, param=f"{where}.{field}")
        if content is None and not self.tool_calls:
            raise ApiError(400, f"{where}.content must be text, got null", param=f"{where}.content")
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        # `developer` is OpenAI's newer name for the role `system`.
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if (name := self.name or functions.get(self.tool_call_id or "")) is not None:
            plain["name"] = name
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            plain["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _object(call.function.arguments, f"{where}.tool_calls[{index}]"),
                    },
                }
                for index, call in enumerate(self.tool_calls)
            ]
        return plain


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as the chat template takes them.

    Raises:
        ApiError: as `Message.for_template`.
    """
    functions = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
    return [message.for_template(f"messages[{index}]", functions) for index, message in enumerate(messages)]


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = read_json(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        name = f"{where}.function.arguments"
        raise ApiError(400, f"{name} must be a JSON object as text, got {text!r:.60}", param=name)
    return value

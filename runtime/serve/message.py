"""A conversation's messages, as OpenAI's API gives them and as chat templates take them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from runtime.serve.error import ApiError
from runtime.serve.options import Body


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
    # What clients send back of an earlier answer, where it holds nothing.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self, where: str) -> dict[str, Any]:
        """The message as transformers' templates know it: text in one piece, arguments as an object.

        Raises:
            ApiError: it has no content, or arguments that are no object.
        """
        content = self.content
        if content is None and not self.tool_calls:
            raise ApiError(400, f"{where}.content must be text, got null", param=f"{where}.content")
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        # A developer's message is what was a system's before.
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        for key in ("name", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                plain[key] = value
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


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        name = f"{where}.function.arguments"
        raise ApiError(400, f"{name} must be a JSON object as text, got {text!r:.60}", param=name)
    return value

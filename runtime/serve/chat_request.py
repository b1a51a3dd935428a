"""The request of `/v1/chat/completions`: a conversation, and options for its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from runtime.serve.error import ApiError
from runtime.serve.message import Message, conversation
from runtime.serve.options import MOST_LOGPROBS, AnswerOptions
from runtime.serve.service import Read, Service, Work
from runtime.serve.tool import Function, Tool, ToolChoice


class ChatRequest(AnswerOptions):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def functions(self) -> list[Function]:
        """The functions that the model may call."""
        return [] if self.tool_choice == "none" else [tool.function for tool in self.tools or ()]

    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools as the chat template is given them; None where there are none."""
        return [
            {"type": "function", "function": function.model_dump(exclude_none=True, exclude={"strict"})}
            for function in self.functions
        ] or None

    def work(self, service: Service) -> Work:
        """The request as work for the engine.

        Raises:
            ApiError, GemmaRuntimeError: the request cannot be run.
        """
        if not service.tokenizer.has_chat_template:
            raise ApiError(
                400, "this model has no chat template, as base models have none: use /v1/completions", param="messages"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        most, limit = self.max_completion_tokens, self.max_tokens
        if None not in (most, limit) and most != limit:
            raise ApiError(400, f"max_tokens must be max_completion_tokens = {most}, got {limit}", param="max_tokens")
        forced = self._forced()
        options = self.for_engine()
        options["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None

        def read() -> Read:
            talk, tools = conversation(self.messages), self.shown_tools()
            if tools is not None:
                written = service.call_format
                if written.has_special_tokens:
                    options["skip_special_tokens"] = False
                if forced:
                    options["response_format"] = written.forced(forced)
            return [service.tokenizer.apply_chat(talk, tools)], limit if most is None else most, options

        return Work(self.answers, read)

    def _forced(self) -> list[Function]:
        """The functions of which one must be called; empty where no call is forced.

        Raises:
            ApiError: `tool_choice` does not fit the tools or the other fields.
        """
        functions, choice = self.functions, self.tool_choice
        if self.tools is None:
            for name in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, name) not in (None, "none"):
                    raise ApiError(400, f"{name} needs tools", param=name)
        if choice in (None, "none", "auto"):
            if any(function.strict for function in functions):
                message = 'strict needs a tool_choice that asks for a call: "required", or a function by name'
                raise ApiError(400, message, param="tools", code="unsupported_parameter")
            return []
        if self.response_format is not None and self.response_format.get("type") != "text":
            message = f"response_format must be left out where tool_choice asks for a call, got {self.response_format}"
            raise ApiError(400, f"{message:.200}", param="response_format")
        if choice == "required":
            return functions
        assert choice is not None and not isinstance(choice, str)
        named = [function for function in functions if function.name == choice.function.name]
        if not named:
            message = f"tool_choice must name one of the tools, got {choice.function.name!r}"
            raise ApiError(400, message, param="tool_choice")
        return named[:1]

"""Tool calls, separated from the text of an answer as it arrives."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator

from runtime.serve.call_format import CallFormat
from runtime.serve.message import FunctionCall, ToolCall


class CallReader:
    """Separates tool calls from text while an answer arrives.

    Args:
        format: how calls are written.
        names: of the known functions; a call of any other is text.
        most: how many calls are read; what follows them is text.
    """

    def __init__(self, format: CallFormat, names: Collection[str], most: int | None = None) -> None:
        self._format, self._names, self._left = format, names, most
        self._opening = format.begin or format.notation.opening
        self._buffer = ""
        self._ends = False  # a call has just been read, and its closing text may follow

    def push(self, text: str) -> Iterator[str | ToolCall]:
        """Takes more of the answer, and yields the text and calls that are certain by now."""
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
            if (
                "}" not in text
                or (found := self._format.notation.read(self._buffer[len(self._format.begin) :])) is None
            ):
                return
            name, arguments, length = found
            if name not in self._names:
                return
            self._buffer, self._ends = self._buffer[len(self._format.begin) + length :], True
            if self._left is not None:
                self._left -= 1
            function = FunctionCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
            yield ToolCall(id=f"call_{uuid.uuid4().hex}", type="function", function=function)

    def finish(self) -> str:
        """The text left at the end of the answer, without a call's closing text."""
        left, self._buffer = self._buffer, ""
        return "" if self._ends and self._format.end.startswith(left.lstrip()) else left

    def _skip_end(self) -> bool:
        """Drops a call's closing text and the white space around it; returns whether anything else has arrived."""
        rest = self._buffer.lstrip()
        if self._format.end.startswith(rest):
            return False
        self._buffer = rest.removeprefix(self._format.end).lstrip()
        self._ends = not self._buffer
        return not self._ends


def _overlap(text: str, opening: str) -> int:
    """How many characters at the end of a text may be the beginning of an opening."""
    return next((size for size in range(len(opening) - 1, 0, -1) if text.endswith(opening[:size])), 0)

"""The standard streams of the command line: any text can be written, whatever their encoding, even to closed ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from runtime.cli.arguments import NAME
from runtime.errors import InvalidArgument

# Control characters as symbols, but for line break and tab: C0 and DEL have pictures in Unicode, C1 has none.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def prepare() -> None:
    """Make the process's streams usable.

    A closed one, as after `>&-`, is opened on /dev/null: otherwise the next file to be opened would take its number,
    and what a library prints would end up in that file. A character that a stream's encoding lacks is replaced, so
    that no answer is cut short by an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def flush_or_discard(stream: TextIO) -> None:
    """Flush a stream, or discard what it cannot write: left in Python's buffer, it would fail again at exit."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(message: str) -> None:
    """Print an error on stderr; if that cannot be written, the exit code still tells."""
    with contextlib.suppress(OSError):
        print(f"{NAME}: error: {message}", file=sys.stderr)


def is_interactive() -> bool:
    """Whether a person types and reads: stdin and stdout are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_stdin() -> str:
    """All of stdin, without its last line break."""
    return _decoded(sys.stdin.buffer.read()).removesuffix("\n")


def stdin_lines() -> Iterator[str]:
    return map(_decoded, sys.stdin.buffer)


def as_json(value: Any) -> str:
    """JSON of one line, in ASCII where stdout's encoding lacks other characters."""
    return json.dumps(value, ensure_ascii=not _holds_any_text(sys.stdout))


def displayed(text: str) -> str:
    """A model's or user's text as stdout gets it: a terminal must not act on control characters in it."""
    return text.translate(_PICTURES) if sys.stdout.isatty() else text


def dimmed(text: str) -> str:
    """Text that a terminal shows dimmed; unchanged where stdout is none, or NO_COLOR or TERM=dumb is set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\033[2m{text}\033[0m"


def _decoded(line: bytes) -> str:
    """Text from stdin, which is UTF-8 whatever the locale."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"stdin must be UTF-8 text: {error}") from None


def _holds_any_text(stream: TextIO) -> bool:
    """Whether a stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-").startswith("utf")

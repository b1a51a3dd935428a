"""The standard streams of the command line: text is written whatever they can hold, and even where they are closed."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def prepare() -> None:
    """Makes the process's streams ready. One that is closed, as after `>&-`, leads nowhere instead: else the next file
    that is opened would take its number, and what a library prints would end up in it. A character that a stream's
    encoding lacks is replaced, as an answer cut short by an error helps nobody."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def settle(stream: TextIO) -> None:
    """What cannot be written stays in Python's buffer and would fail once more at exit: lets it go nowhere."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def holds_any_text(stream: TextIO) -> bool:
    """Whether a stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-").startswith("utf")

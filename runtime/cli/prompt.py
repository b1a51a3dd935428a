"""The prompt argument of `generate` and `inspect`."""

from __future__ import annotations

import argparse

from runtime.cli.streams import read_stdin
from runtime.errors import InvalidArgument


def add_prompt(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", metavar="PROMPT", help="the text; - reads it from stdin")


def read_prompt(argument: str) -> str:
    """The prompt itself, or with "-" what stdin holds."""
    prompt = read_stdin() if argument == "-" else argument
    if not prompt:
        raise InvalidArgument("the prompt is empty: expected some text")
    return prompt

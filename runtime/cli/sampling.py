"""How an answer's tokens are chosen, as options of the command line."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

from runtime.cli.arguments import whole
from runtime.errors import InvalidArgument

# The options that `runtime.generate` takes under the same names.
NAMES = (
    *("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logprobs"),
)


def add_sampling(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--temperature",
        type=_number("a finite number from 0 on", lambda x: x >= 0),
        default=0.0,
        metavar="T",
        help="draw tokens at this temperature (0: pick the most likely)",
    )
    add("--top-k", type=whole(0), metavar="K", help="draw from the K likeliest tokens (0: from all)")
    fraction = _number("a number above 0, at most 1", lambda x: 0 < x <= 1)
    add("--top-p", type=fraction, metavar="P", help="draw from the likeliest tokens of this probability together")
    add(
        "--min-p",
        type=_number("a number from 0 to 1", lambda x: 0 <= x <= 1),
        metavar="P",
        help="draw from tokens at least this fraction as likely as the likeliest",
    )
    add("--seed", type=whole(0, 2**64 - 1), metavar="N", help="which draws; equal seeds give equal answers (random)")
    add(
        "--repetition-penalty",
        type=_number("a finite number above 0", lambda x: x > 0),
        metavar="X",
        help="make tokens of prompt and answer less likely, from 1 on (the checkpoint's, as a rule 1)",
    )
    penalty = _number("a number from -2 to 2", lambda x: abs(x) <= 2)
    add("--presence-penalty", type=penalty, default=0.0, metavar="X", help="lower the logits of the answer's tokens")
    add("--frequency-penalty", type=penalty, default=0.0, metavar="X", help="the same for each time they come")
    add("--logprobs", type=whole(0), metavar="K", help="with --json: log probabilities, and those of the K likeliest")
    forms = command.add_mutually_exclusive_group()
    forms.add_argument("--json-schema", metavar="FILE", help="answer in JSON that is valid by this schema")
    forms.add_argument("--regex", metavar="REGEX", help="answer with a whole match of a regular expression")


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `runtime.generate` that a command line asks for.

    Raises:
        InvalidArgument: the schema's file cannot be read, or is not JSON.
    """
    found = {name: getattr(options, name) for name in NAMES}
    if options.json_schema is not None:
        found["response_format"] = _schema(options.json_schema)
    elif options.regex is not None:
        found["response_format"] = {"regex": options.regex}
    return found


def _schema(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            schema = json.load(file)
    except OSError as error:
        raise InvalidArgument(f"--json-schema: cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InvalidArgument(f"--json-schema: {path} must hold JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidArgument(f"--json-schema: {path} must hold an object, got {type(schema).__name__}")
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _number(expected: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: a finite number that `holds`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return number

"""`gemma-runtime inspect`: what a model computes, token by token."""

from __future__ import annotations

import argparse

import runtime
from runtime.cli import arguments
from runtime.cli.exit_codes import DONE
from runtime.cli.output import check_writable, print_outcome
from runtime.cli.prompt import add_prompt, read_prompt


def add(commands: arguments.Commands) -> None:
    command = arguments.add_command(
        commands, run, "Look inside: modules, token ids, best candidates, decoding step by step."
    )
    arguments.add_model(command)
    arguments.add_quantize(command)
    arguments.add_max_seq_len(command)
    arguments.add_json(command)
    arguments.add_eager(command)
    add_prompt(command)
    command.add_argument(
        "--top-k", type=arguments.whole(1), default=5, metavar="N", help="candidates to list (%(default)s)"
    )
    command.add_argument(
        "--positions", type=int, nargs="+", metavar="I", help="tokens to look at, negative from the end (-1 -2)"
    )
    command.add_argument(
        "--steps", type=arguments.whole(0), default=0, metavar="N", help="tokens to decode (%(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    prompt = read_prompt(options.prompt)
    check_writable(options.json)
    inspection = runtime.inspect(
        arguments.load(options), prompt, top_k=options.top_k, positions=options.positions, steps=options.steps
    )
    print_outcome(inspection, options.json)
    return DONE

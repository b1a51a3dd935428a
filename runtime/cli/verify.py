"""`gemma-runtime verify`: the parity audit."""

from __future__ import annotations

import argparse

import runtime
from runtime.cli import arguments
from runtime.cli.exit_codes import AUDIT_FAILED, DONE
from runtime.cli.output import json_file


def add(commands: arguments.Commands) -> None:
    command = arguments.add_command(
        commands,
        run,
        "Audit a model against Hugging Face, token for token.",
        "Audit a model against Hugging Face's greedy decoding. Exit code 0: every token is equal or every difference "
        "explained; 1: not.",
    )
    arguments.add_model(command, positional=True)
    arguments.add_quantize(command)
    chosen = command.add_mutually_exclusive_group()
    chosen.add_argument("--prompts", metavar="FILE", help='one prompt a line, or .jsonl with {"prompt": text or ids}')
    chosen.add_argument("--suite", choices=("short", "code", "multilingual", "long"), help="one suite instead of all")
    command.add_argument(
        "--tokens", type=arguments.whole(1), default=64, metavar="N", help="tokens of an answer (%(default)s)"
    )
    command.add_argument("--eager", action="store_true", help="audit plain decode steps: no CUDA graphs")
    command.add_argument(
        "--oracle", choices=("hf", "hf-static"), default="hf", help="Hugging Face's cache (%(default)s)"
    )
    command.add_argument("--base-rate", action="store_true", help="run Hugging Face against itself too")
    arguments.add_json(command, "the table; an interrupted audit continues from there")
    arguments.add_html(command)


def run(options: argparse.Namespace) -> int:
    report = runtime.verify(
        arguments.source(options),
        prompts=options.prompts,
        suite=options.suite,
        tokens=options.tokens,
        device=options.device,
        dtype=options.dtype,
        eager=options.eager,
        threads=options.threads,
        quantize=options.quantize,
        oracle=options.oracle,
        base_rate=options.base_rate,
        json_path=json_file(options.json),
        html_path=options.html,
    )
    print(report.to_json() if options.json == arguments.STDOUT else report)
    return DONE if report.passed else AUDIT_FAILED

"""`gemma-runtime generate`: continue a text."""

from __future__ import annotations

import argparse
import sys

from runtime.cli import arguments
from runtime.cli.answer import answer_json, print_answers
from runtime.cli.exit_codes import DONE, INTERRUPTED
from runtime.cli.output import check_writable, json_file
from runtime.cli.prompt import add_prompt, read_prompt
from runtime.cli.sampling import add_sampling, sampling_options
from runtime.parity import output_file


def add(commands: arguments.Commands) -> None:
    command = arguments.add_command(commands, run, "Continue a text.")
    arguments.add_model(command)
    arguments.add_quantize(command)
    arguments.add_max_seq_len(command)
    arguments.add_json(command)
    arguments.add_eager(command)
    add_prompt(command)
    arguments.add_answer(command)
    add_sampling(command)
    command.add_argument(
        "-n", type=arguments.whole(1), metavar="N", help="how many answers, each with a seed of its own"
    )
    command.add_argument(
        "--special-tokens", action="store_true", help="print special tokens too, such as the one that ends the answer"
    )
    command.add_argument("--stats", action="store_true", help="print the numbers even if stderr is not a terminal")


def run(options: argparse.Namespace) -> int:
    prompt = read_prompt(options.prompt)
    check_writable(options.json)
    options.sampling = sampling_options(options)
    model = arguments.load(options)
    echo = prompt if sys.stdout.isatty() and options.prompt != "-" else ""
    as_json, skip = options.json == arguments.STDOUT, not options.special_tokens
    results, interrupted = print_answers(
        model, prompt, options, options.max_new_tokens, as_json, echo, skip_special_tokens=skip, n=options.n
    )
    result = results[0]
    file = json_file(options.json)
    if file is not None:
        output_file.write(file, "".join(f"{answer_json(model, result)}\n" for result in results))
    if result.token_ids and not result.text and not (options.stop or as_json or interrupted):
        print("the answer has no text, only special tokens (--special-tokens prints them)", file=sys.stderr)
    if options.stats or (sys.stderr.isatty() and not as_json):
        print(result.stats, file=sys.stderr)
    return INTERRUPTED if interrupted else DONE

"""`gemma-runtime info`: this machine and a model on it, or a decode step's cost sheet on a GPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from runtime.cli import arguments
from runtime.cli.exit_codes import DONE
from runtime.cli.output import check_writable, print_outcome
from runtime.errors import InvalidArgument

if TYPE_CHECKING:
    from runtime.cost.info import Info
    from runtime.cost.plan import Plan


def add(commands: arguments.Commands) -> None:
    command = arguments.add_command(
        commands, run, "Versions, device, memory plan, and how fast this machine could decode."
    )
    arguments.add_model(command, positional=True)
    arguments.add_quantize(command)
    arguments.add_max_seq_len(command)
    arguments.add_json(command)
    command.add_argument(
        "--plan",
        nargs="?",
        const="h100",
        metavar="GPU",
        help="the cost sheet of a decode step, no GPU needed: a100, h100 (the default), h200, b200, rtx-3090, rtx-4090 "
        "or rtx-5090; --model may be a published size such as gemma-1.1-2b, which needs no files",
    )
    command.add_argument("--batch-size", type=arguments.whole(1), metavar="N", help="rows, with --plan (1)")
    command.add_argument(
        "--predict",
        action="store_true",
        help="with --plan h100 or h200: compile each kernel and simulate it on one multiprocessor, half a minute",
    )
    command.add_argument("--context", type=arguments.whole(1), metavar="N", help="tokens, with --plan (128)")


def run(options: argparse.Namespace) -> int:
    from runtime.cost import info, plan

    if not options.plan and (options.batch_size or options.context or options.predict):
        raise InvalidArgument("--batch-size, --context and --predict go with --plan, which was not given")
    if options.plan and options.quantize == "gguf":
        raise InvalidArgument(f"--quantize gguf is for a CPU, --plan {options.plan} for a GPU")
    check_writable(options.json)
    outcome: Plan | Info
    if options.plan:
        outcome = plan.gather(
            arguments.source(options),
            gpu=options.plan,
            dtype=options.dtype,
            batch=options.batch_size or 1,
            context=options.context or 128,
            predict=options.predict,
            quantize=options.quantize,
        )
    else:
        outcome = info.gather(
            arguments.source(options),
            device=options.device,
            dtype=options.dtype,
            max_seq_len=options.max_seq_len,
            threads=options.threads,
            quantize=options.quantize,
        )
    print_outcome(outcome, options.json)
    return DONE

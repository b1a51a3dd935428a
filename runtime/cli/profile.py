"""`gemma-runtime profile`: where the time of one request goes."""

from __future__ import annotations

import argparse
import gzip
import os
from pathlib import Path

from runtime.cli import arguments
from runtime.cli.exit_codes import DONE
from runtime.cli.output import check_writable
from runtime.cli.prompt import add_prompt, read_prompt
from runtime.parity import output_file


def add(commands: arguments.Commands) -> None:
    command = arguments.add_command(
        commands,
        run,
        "Trace one request: steps, operations, readback.",
        "Continue a text while torch's profiler records, and write a trace that Perfetto (ui.perfetto.dev) and "
        "chrome://tracing open.",
    )
    arguments.add_model(command)
    arguments.add_quantize(command)
    arguments.add_max_seq_len(command)
    arguments.add_eager(command)
    add_prompt(command)
    arguments.add_max_new_tokens(command, default=16)
    command.add_argument("--trace", required=True, metavar="FILE", help="where to write the trace, as JSON")


def run(options: argparse.Namespace) -> int:
    prompt = read_prompt(options.prompt)
    check_writable(options.trace)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise torch says on stderr when its profiler starts and stops
    model = arguments.load(options)
    from runtime.inspection.trace import trace

    traced = trace(model, prompt, options.max_new_tokens)
    is_compressed = options.trace.endswith(".gz")
    output_file.write(Path(options.trace), gzip.compress(traced.chrome) if is_compressed else traced.chrome)
    print(traced)
    return DONE

"""The command line `gemma-runtime COMMAND`, also `python -m runtime COMMAND`.

A command's output goes to stdout, messages about it to stderr. exit_codes.py lists the exit codes; each command is a
file of its own and imports slow modules only when it runs.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import runtime
from runtime.cli import (
    chat,
    check,
    collector,
    completion,
    generate,
    info,
    inspect,
    profile,
    quantize,
    serve,
    streams,
    verify,
)
from runtime.cli.arguments import NAME, Parser, subcommands
from runtime.cli.exit_codes import BAD_INPUT, INTERNAL_ERROR, INTERRUPTED, READER_GONE
from runtime.errors import GemmaRuntimeError, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    streams.prepare()
    arguments = sys.argv[1:] if arguments is None else arguments
    is_bench = bool(arguments) and arguments[0] == "bench"  # it parses its own arguments, and raises built-in errors
    bad_input = (GemmaRuntimeError, OSError, ImportError, *((ValueError, TypeError) if is_bench else ()))
    try:
        try:
            return _run(arguments, is_bench)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt goes on a line of its own
        return INTERRUPTED
    except BrokenPipeError:
        streams.flush_or_discard(sys.stdout)
        return READER_GONE
    except bad_input as error:
        streams.flush_or_discard(sys.stdout)
        streams.print_error(one_line(error))
        return BAD_INPUT
    except Exception:
        streams.flush_or_discard(sys.stdout)
        streams.print_error(f"internal error, please report it\n{traceback.format_exc()}".rstrip())
        return INTERNAL_ERROR
    finally:
        streams.flush_or_discard(sys.stderr)
        collector.resume()


def _run(arguments: Sequence[str], is_bench: bool) -> int:
    if is_bench:
        from runtime.bench.command import main as bench

        return bench(arguments[1:])
    options = parser().parse_args(arguments)
    return options.run(options)


def parser() -> Parser:
    """The parser of the whole command line, except the commands of `bench`, which has its own."""
    whole = Parser(
        prog=NAME, description="Greedy decoding of Gemma 1, 2 and 3, token for token what Hugging Face generates."
    )
    whole.add_argument("--version", action="version", version=f"{NAME} {runtime.__version__}")
    commands = subcommands(whole)
    for command in (generate, chat, serve, inspect, info, verify, quantize, check, profile):
        command.add(commands)
    commands.add_parser("bench", help="Measure speed: latency, throughput, kernels, peers.", add_help=False)
    completion.add(commands, whole)
    return whole

"""The arguments that commands share. Errors are one line; whole numbers have bounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import runtime
from runtime.model.config import MAX_THREADS

if TYPE_CHECKING:
    from runtime.model.model import Model

NAME = "gemma-runtime"
MAX_NEW_TOKENS = 128
SPECULATED_ROWS = 8
Commands = Any  # what argparse's add_subparsers returns has no public name


class Parser(argparse.ArgumentParser):
    """Complains in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message} (see {self.prog} --help)\n")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number of at least `least` and, if given, at most `most`."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if number < least or (most is not None and number > most):
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {bounds}, got {number}")
        return number

    return whole_number


def add_command(
    commands: Commands, run: Callable[[argparse.Namespace], int], purpose: str, description: str | None = None
) -> argparse.ArgumentParser:
    """A command, named after the module that `run` is in."""
    name = run.__module__.rpartition(".")[2]
    added = commands.add_parser(name, help=purpose, description=description or purpose, allow_abbrev=False)
    added.set_defaults(run=run)
    return added


def add_model(command: argparse.ArgumentParser, positional: bool = False) -> None:
    """--model and --revision, and what it computes on: --device, --dtype, --threads.

    Args:
        positional: whether the model may also be given without --model.
    """
    named = command.add_mutually_exclusive_group()
    meaning = "folder, .gguf file, hub id or 'demo' (default: $GEMMA_RUNTIME_MODEL or demo)"
    named.add_argument("--model", metavar="MODEL", help="the same" if positional else meaning)
    if positional:
        named.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=meaning)
    command.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub repository (as OWNER/NAME@REV; default: main)"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    command.add_argument(
        "--dtype", default="auto", help="a type such as bf16 or float32 (default: auto, the checkpoint's own)"
    )
    command.add_argument(
        "--threads", type=whole(1, MAX_THREADS), metavar="N", help="threads on a CPU (default: as many as can be busy)"
    )


def add_max_seq_len(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-seq-len",
        type=whole(1),
        metavar="N",
        help="prompt plus answer, in tokens (4096, or the checkpoint's own limit where that is less)",
    )


def add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def add_eager(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--eager",
        action="store_true",
        help="decode by plain steps: no CUDA graph, and on a CPU Hugging Face's own operations",
    )


def add_answer(command: argparse.ArgumentParser) -> None:
    """How an answer is made and printed."""
    command.add_argument(
        "--max-new-tokens",
        type=whole(0),
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="most tokens to generate (%(default)s)",
    )
    command.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    command.add_argument(
        "--speculate",
        choices=("prompt",),
        help="guess tokens from text so far, and check several at once: the same answer, sooner where it repeats text; "
        f"on a GPU the model is loaded for {SPECULATED_ROWS} rows",
    )
    command.add_argument("--no-stream", action="store_true", help="print the text when it is complete")


def source(options: argparse.Namespace) -> Any:
    """The model's name, with the revision where one is given."""
    from runtime.checkpoint import sources

    return sources.pinned(options.model, options.revision)


def load(options: argparse.Namespace) -> Model:
    return runtime.load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        max_seq_len=options.max_seq_len,
        max_batch=_rows(options),
        eager=options.eager,
        revision=options.revision,
        threads=options.threads,
    )


def _rows(options: argparse.Namespace) -> int:
    """The most rows of a model that answers one prompt at a time: one, but for guesses on a GPU, which are rows too."""
    if getattr(options, "speculate", None) is None:
        return 1
    from runtime.model.placement import resolve_device

    return 1 if resolve_device(options.device) == "cpu" else SPECULATED_ROWS

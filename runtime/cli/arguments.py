"""The arguments that commands share. Errors are one line; whole numbers have bounds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import runtime
from runtime.cli import collector
from runtime.cli.exit_codes import BAD_INPUT
from runtime.model.config import MAX_THREADS, QUANTIZE

if TYPE_CHECKING:
    from runtime.api import Model

NAME = "gemma-runtime"
MAX_NEW_TOKENS = 128
SPECULATED_ROWS = 8
STDOUT = "-"  # of --json: no file
JSON_SUFFIX = ".json"
Commands = Any  # what argparse's add_subparsers returns has no public name


class Parser(argparse.ArgumentParser):
    """Complains in one line and exits with 2.

    Attributes:
        takes_json_file: whether there is a --json [FILE]. The word after --json is its file only if it ends in .json;
            argparse alone would take any word, even a prompt.
    """

    takes_json_file = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        # Before anything is parsed: the value of an option that does not exist would be taken for an argument.
        unknown = [word for word in given[:end] if self._subparsers is None and self._is_unknown(word)]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        for index, (word, following) in enumerate(zip(given[:end], [*given[1:end], ""], strict=False)):
            if self.takes_json_file and word == "--json" and not following.endswith(JSON_SUFFIX):
                given[index] = f"--json={STDOUT}"
        return super().parse_known_args(given, namespace)

    def _is_unknown(self, word: str) -> bool:
        """Whether a word can only be an option, and is none of this command's; argparse takes a text with a space for
        an argument."""
        return word.startswith("--") and " " not in word and word.partition("=")[0] not in self._option_string_actions

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


def some_of(known: Iterable[object]) -> Callable[[str], list[str]]:
    """A type for argparse: a comma-separated list of some of these."""
    expected = [*map(str, known)]

    def chosen(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in expected]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(expected)}, got {', '.join(unknown)}")
        return names

    return chosen


def add_group(commands: Commands, name: str, purpose: str) -> Commands:
    """A command that has commands of its own; without one it prints its help."""
    group = commands.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
    return subcommands(group)


def subcommands(parser: Parser) -> Commands:
    """The commands of a parser. Without one it prints its help on stderr and exits with 2, as for other bad input."""

    def helped(options: argparse.Namespace) -> int:
        parser.print_help(sys.stderr)
        return BAD_INPUT

    parser.set_defaults(run=helped)
    return parser.add_subparsers(metavar="COMMAND", title="commands")


def add_command(
    commands: Commands, run: Callable[[argparse.Namespace], int], purpose: str, description: str | None = None
) -> Parser:
    """A command, named after the module that `run` is in."""
    name = run.__module__.rpartition(".")[2]
    added: Parser = commands.add_parser(name, help=purpose, description=description or purpose, allow_abbrev=False)
    added.set_defaults(run=run)
    return added


def add_name(command: argparse.ArgumentParser, positional: bool) -> None:
    """The model's name: --model and, for commands without another argument, MODEL."""
    named = command.add_mutually_exclusive_group()
    meaning = "folder, .gguf file, hub id or 'demo' (default: $GEMMA_RUNTIME_MODEL or demo)"
    named.add_argument("--model", metavar="MODEL", help="the same" if positional else meaning)
    if positional:
        named.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=meaning)


def add_device(command: argparse.ArgumentParser, others: str = "") -> None:
    """--device; `others` are devices that only this command takes."""
    command.add_argument(
        "--device", default="auto", metavar="DEVICE", help=f"auto, cpu, cuda{others} or cuda:N (default: %(default)s)"
    )


def add_model(command: argparse.ArgumentParser, positional: bool = False) -> None:
    """The model's name and --revision, and what it computes on: --device, --dtype, --threads.

    Args:
        positional: whether the model may also be given without --model.
    """
    add_name(command, positional)
    command.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub repository (as OWNER/NAME@REV; default: main)"
    )
    add_device(command)
    command.add_argument(
        "--dtype",
        default="auto",
        metavar="DTYPE",
        help="a type such as bf16 or float32 (default: auto, the checkpoint's own; of a GGUF file its own blocks on a "
        "CPU, else bf16)",
    )
    command.add_argument(
        "--threads", type=whole(1, MAX_THREADS), metavar="N", help="threads on a CPU (default: as many as can be busy)"
    )


def add_quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="keep the matrices of a GGUF file, or of the demo, in its own blocks (gguf, on a CPU), or quantise those "
        "of any checkpoint (int8, int4); all else in float32 or, on a GPU, in --dtype",
    )


def add_max_seq_len(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-seq-len",
        type=whole(1),
        metavar="N",
        help="prompt plus answer, in tokens (4096, or the checkpoint's own limit where that is less)",
    )


def add_json(command: Parser, beside: str = "the text") -> None:
    """--json [FILE]; `beside` names what stdout gets when the JSON goes to a file."""
    command.takes_json_file = True
    command.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help=f"print JSON, or write it to FILE (.json) beside {beside}",
    )


def add_html(command: argparse.ArgumentParser) -> None:
    command.add_argument("--html", metavar="FILE", help="write the report as a page")


def add_eager(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--eager",
        action="store_true",
        help="decode by plain steps: no CUDA graph, and on a CPU Hugging Face's own operations",
    )


def add_max_new_tokens(command: argparse.ArgumentParser, default: int) -> None:
    command.add_argument(
        "--max-new-tokens", type=whole(0), default=default, metavar="N", help="most tokens to generate (%(default)s)"
    )


def add_answer(command: argparse.ArgumentParser) -> None:
    """The options for how an answer is generated and printed."""
    add_max_new_tokens(command, MAX_NEW_TOKENS)
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
    with collector.paused():
        return runtime.load(
            options.model,
            device=options.device,
            dtype=options.dtype,
            max_seq_len=options.max_seq_len,
            max_batch=_rows(options),
            eager=options.eager,
            revision=options.revision,
            threads=options.threads,
            quantize=options.quantize,
        )


def _rows(options: argparse.Namespace) -> int | str:
    """The most rows: as many as are asked for, else one, since a command answers one prompt at a time. On a GPU guesses
    need rows too."""
    if (rows := getattr(options, "max_batch", None)) is not None:
        return rows
    if getattr(options, "speculate", None) is None:
        return 1
    from runtime.model.placement import resolve_device

    return 1 if resolve_device(options.device) == "cpu" else SPECULATED_ROWS

"""`gemma-runtime completion bash | zsh | fish`: a script that lets a shell complete commands, options and files."""

from __future__ import annotations

import argparse
from typing import Any

from runtime.cli import arguments
from runtime.cli.exit_codes import DONE
from runtime.errors import MissingPackage

SHELLS = ("bash", "zsh", "fish")
FILES = {"FILE", "MODEL", "REPORT", "A", "B"}  # metavars of arguments that may be a file or folder


def add(commands: arguments.Commands, whole: arguments.Parser) -> None:
    """Add the command; `whole` is the parser of the whole command line."""
    command = arguments.add_command(
        commands,
        run,
        "Print a shell's completion script.",
        "Print a script that completes commands, options and files, as for bash: "
        "eval \"$(gemma-runtime completion bash)\". Needs the extra 'completion'.",
    )
    command.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help="whose script")
    command.set_defaults(whole=whole, commands=commands)


def run(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise MissingPackage("completion needs shtab: pip install 'gemma-runtime[completion]'") from None
    from runtime.bench.command import add_to

    add_to(options.commands.choices["bench"])
    _complete_files(options.whole, shtab.FILE)
    print(shtab.complete(options.whole, options.shell))
    return DONE


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Mark arguments that may be files with shtab's completion for files, in a parser and those of its commands."""
    for action in parser._actions:
        if action.metavar in FILES:
            action.complete = files  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)

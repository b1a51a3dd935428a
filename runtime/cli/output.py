"""Where a command's outcome goes: to stdout, as text or as JSON, and to the files that it was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from runtime.cli.arguments import STDOUT
from runtime.cli.streams import as_json
from runtime.parity import output_file


class Printable(Protocol):
    """An outcome: text by `print`, data by `to_dict`."""

    def to_dict(self) -> dict[str, Any]: ...


def json_file(option: str | None) -> Path | None:
    """The file that --json names, if any."""
    return None if option in (None, STDOUT) else Path(option or "")


def check_writable(*options: str | None) -> None:
    """Refuse files that cannot be written, or one for two reports, before anything is computed.

    Raises:
        OutputError: a file cannot be written, or is given twice.
    """
    output_file.check_writable(*(option for option in options if option is not None and option != STDOUT))


def print_outcome(outcome: Printable, option: str | None) -> None:
    """Print an outcome, as JSON for `--json`; for `--json FILE` write the JSON to the file and print text."""
    text = as_json(outcome.to_dict())
    file = json_file(option)
    if file is not None:
        output_file.write(file, f"{text}\n")
    print(text if option == STDOUT else outcome)

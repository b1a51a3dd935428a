"""The files that an audit writes its report to."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import OutputError


def check_writable(*paths: str | os.PathLike[str]) -> None:
    """Checks before a long audit that its reports can be written, each to a file of its own.

    Raises:
        OutputError: one cannot.
    """
    seen: set[Path] = set()
    for path in paths:
        file = Path(path).absolute()
        if file.is_dir():
            raise OutputError(f"cannot write the report {os.fspath(path)}: it is a folder")
        if not file.parent.is_dir():
            raise OutputError(f"cannot write the report {os.fspath(path)}: no folder {file.parent}")
        if not os.access(file.parent, os.W_OK):
            raise OutputError(f"cannot write the report {os.fspath(path)}: no permission to write in {file.parent}")
        if file in seen:
            raise OutputError(f"cannot write the report {os.fspath(path)}: expected two files, got it for both")
        seen.add(file)


def write(path: Path, text: str) -> None:
    """Writes the whole file or nothing.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write the report {path}: {error.strerror or error}") from error

"""The files that an audit writes its report to."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import OutputError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Checks before a long audit that its report can be written.

    Raises:
        OutputError: it cannot.
    """
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise OutputError(f"cannot write the report {os.fspath(path)}: it is a folder")
    if not folder.is_dir():
        raise OutputError(f"cannot write the report {os.fspath(path)}: no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write the report {os.fspath(path)}: no permission to write in {folder}")


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

"""The files that an audit writes its report to."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import OutputError


def check_writable(*paths: str | os.PathLike[str]) -> None:
    """Checks before a long audit that its reports can be written, each to a file of its own.

    Raises:
        OutputError: a report cannot be written, or two share a file.
    """
    seen: set[Path] = set()
    for path in paths:
        file = Path(path).absolute()
        if file.is_dir():
            raise OutputError(f"cannot write the report {os.fspath(path)}: it is a folder")
        if is_device(file):
            if not os.access(file, os.W_OK):
                raise OutputError(f"cannot write the report {os.fspath(path)}: no permission")
            continue
        try:
            file = file.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a link to itself, or a null character
            raise OutputError(f"cannot write the report {os.fspath(path)!r}: {error}") from error
        if not file.parent.is_dir():
            raise OutputError(f"cannot write the report {os.fspath(path)}: no folder {file.parent}")
        if not os.access(file.parent, os.W_OK):
            raise OutputError(f"cannot write the report {os.fspath(path)}: no permission to write in {file.parent}")
        if file in seen:
            raise OutputError(f"cannot write the report {os.fspath(path)}: expected two files, got it for both")
        seen.add(file)


def write(path: Path, text: str) -> None:
    """Writes the whole file or nothing. A link is followed and its target replaced; a device or a pipe is written into.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        if is_device(path):
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path.resolve(), text)
    except OSError as error:
        raise OutputError(f"cannot write the report {path}: {error.strerror or error}") from error


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def is_device(path: Path) -> bool:
    """Whether a path is a device or a pipe, such as `>(command)` in a shell, or leads to an open file (/dev/stdout),
    none of which may be replaced by another file."""
    return path.exists() and (not path.is_file() or path.absolute().parts[1] in ("dev", "proc"))

"""The files that reports and traces are written to."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from runtime.errors import OutputError


def check_writable(*paths: str | os.PathLike[str]) -> None:
    """Checks before long work that its reports can be written, each to a file of its own.

    Raises:
        OutputError: a report cannot be written, or two share a file.
    """
    seen: set[Path | tuple[int, int]] = set()
    for path in paths:
        refused = f"cannot write the report {os.fspath(path)}"
        try:
            file, existing, in_place = Path(path).resolve(), _stat(path), is_device(Path(path))
        except (OSError, RuntimeError, ValueError) as error:  # such as a link to itself, or a null character
            raise OutputError(f"{refused}: {getattr(error, 'strerror', None) or error}") from error
        if existing and stat.S_ISDIR(existing.st_mode):
            raise OutputError(f"{refused}: it is a folder")
        if existing and not os.access(path, os.W_OK):
            raise OutputError(f"{refused}: no permission")
        if not in_place and not file.parent.is_dir():
            raise OutputError(f"{refused}: no folder {file.parent}")
        if not in_place and not os.access(file.parent, os.W_OK):
            raise OutputError(f"{refused}: no permission to write in {file.parent}")
        if existing and not stat.S_ISREG(existing.st_mode):
            continue  # a device or a pipe may take several
        identity = (existing.st_dev, existing.st_ino) if existing else file
        if identity in seen:
            raise OutputError(f"{refused}: expected two files, got it for both")
        seen.add(identity)


def write(path: Path, content: str | bytes) -> None:
    """Writes the whole file or nothing. A link is followed and its target replaced. A device or a pipe is written into,
    and so is a file that may be written but not replaced, such as another user's in a sticky folder.

    Args:
        path: the file.
        content: bytes, or text, in which what is not Unicode (of a file name) is replaced, as on stdout.

    Raises:
        OutputError: it cannot be written.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    try:
        if is_device(path):
            _overwrite(path, data)
        else:
            _replace(path.resolve(), data)
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"cannot write the report {path}: {getattr(error, 'strerror', None) or error}") from error


def _replace(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{secrets.token_hex(8)}")  # short, as the file's name may be the longest that fits
    existing = _stat(file)
    mode = 0o666 if existing is None else 0o600
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
            opened.write(data)
            if existing is not None:
                os.chmod(opened.fileno(), stat.S_IMODE(existing.st_mode))
        os.replace(partial, file)
    except PermissionError:
        if existing is None:
            raise
        _overwrite(file, data)
    finally:
        partial.unlink(missing_ok=True)


def _overwrite(path: Path, data: bytes) -> None:
    # Not by "wb": Linux may refuse O_CREAT on what is another user's in a sticky folder.
    with open(os.open(path, os.O_WRONLY | os.O_TRUNC), "wb") as opened:
        opened.write(data)


def _stat(path: str | os.PathLike[str]) -> os.stat_result | None:
    """What a path leads to; None if there is nothing yet."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def is_device(path: Path) -> bool:
    """Whether a path is a device or a pipe, such as `>(command)` in a shell, or leads to an open file (/dev/stdout),
    none of which may be replaced by another file."""
    return path.exists() and (not path.is_file() or _is_open_file(path))


def _is_open_file(path: Path) -> bool:
    path = path.parent.resolve() / path.name
    if str(path).startswith(("/proc/", "/dev/fd/")):
        return True
    return path.is_symlink() and _is_open_file(path.parent / path.readlink())

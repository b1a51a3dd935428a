"""Reading a checkpoint's files: whatever goes wrong is a CheckpointError that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError

JSON_LIMIT = 100_000_000  # bytes of a JSON file or header; the safetensors library's limit


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into a CheckpointError that says that `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def is_file(path: Path) -> bool:
    """Whether there is a file to read.

    Raises:
        CheckpointError: the path is not a file (a folder, a pipe, a broken link), or may not be accessed.
    """
    with reading(path):
        if path.is_file():
            return True
        if os.path.lexists(path):
            raise CheckpointError(f"{path} is not a file" + (", but a broken link" if path.is_symlink() else ""))
    return False


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Raises:
        CheckpointError: it does not, or cannot be read.
    """
    if not is_file(path):
        raise CheckpointError(f"{path} does not exist")
    with reading(path), path.open("rb") as file:
        text = file.read(JSON_LIMIT + 1)
    if len(text) > JSON_LIMIT:
        raise CheckpointError(f"{path} is larger than {JSON_LIMIT / 1e6:.0f} MB, too large for a JSON file of a model")
    try:
        value = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is not valid JSON: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value

"""The journal of an unfinished audit: finished records are on disk, so that the same audit can resume."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from runtime.parity.records import Record

Kind = TypeVar("Kind", bound=Record)
_log = logging.getLogger("gemma_runtime")


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """One line of JSON for each record, under a key that covers everything the record depends on.

    Args:
        file: read if it exists, else created with the first record. A truncated line is ignored. What cannot be read or
            written is done without, with a warning: an audit needs no journal to finish.
    """

    def __init__(self, file: Path) -> None:
        self.file: Path | None = file
        self._lines: dict[str, Any] = {}
        with self._warning("read"):
            for line in file.read_bytes().splitlines() if file.exists() else []:
                with suppress(ValueError, TypeError):
                    self._lines |= json.loads(line)

    def find(self, key: str, kind: type[Kind]) -> Kind | None:
        """The record under a key, or None."""
        try:
            return kind.model_validate(self._lines[key]) if key in self._lines else None
        except ValidationError:  # written by another version
            return None

    def add(self, key: str, record: Record) -> None:
        """Append a record."""
        line = json.dumps({key: record.model_dump(mode="json")})
        with self._warning("written"):
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                truncated = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(("\n" if truncated else "") + line + "\n")

    def remove(self) -> None:
        """Delete the file: the audit is finished and its report written."""
        with self._warning("removed"):
            if self.file is not None:
                self.file.unlink(missing_ok=True)

    @contextmanager
    def _warning(self, done: str) -> Iterator[None]:
        """Goes on without the file where it cannot be used."""
        try:
            yield
        except OSError as error:
            _log.warning("the audit's progress cannot be %s: %s: %s", done, self.file, error.strerror)
            self.file = None

"""The journal of an unfinished audit: finished records are on disk, so that the same audit can resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from runtime.parity.records import Record

Kind = TypeVar("Kind", bound=Record)


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """One line of JSON for each record, under a key that covers everything the record depends on.

    Args:
        file: read if it exists, else created with the first record. A truncated line is ignored.

    Raises:
        OSError: the file exists and cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lines: dict[str, Any] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            try:
                self._lines |= json.loads(line)
            except ValueError:
                continue

    def find(self, key: str, kind: type[Kind]) -> Kind | None:
        """The record under a key, or None."""
        try:
            return kind.model_validate(self._lines[key]) if key in self._lines else None
        except ValidationError:  # written by another version
            return None

    def add(self, key: str, record: Record) -> None:
        """Append a record.

        Raises:
            OSError: it cannot be written.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({key: record.model_dump(mode="json")})
        truncated = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        with self.file.open("a", encoding="utf-8") as file:
            file.write(("\n" if truncated else "") + line + "\n")

    def remove(self) -> None:
        """Delete the file: the audit is finished and its report written."""
        self.file.unlink(missing_ok=True)

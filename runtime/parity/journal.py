"""The journal of an unfinished audit: what is done is on disk, and the same audit asked for again goes on there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from runtime.parity.records import Record

Kind = TypeVar("Kind", bound=Record)


def digest(value: Any) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """One line of JSON for each record, by a key that says all that it depends on.

    Args:
        file: where it is; made with the first record, read if it is there. A line that was cut off is as if not
            written.

    Raises:
        OSError: it is there and cannot be read.
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
        """The record of that key, or None."""
        try:
            return kind.model_validate(self._lines[key]) if key in self._lines else None
        except ValidationError:  # another version's
            return None

    def add(self, key: str, record: Record) -> None:
        """Keeps a record.

        Raises:
            OSError: it cannot be written.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({key: record.model_dump(mode="json")})
        cut_off = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        with self.file.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_off else "") + line + "\n")

    def remove(self) -> None:
        """Forgets everything: the audit is done and its report written."""
        self.file.unlink(missing_ok=True)

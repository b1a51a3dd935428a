"""The header of one GGUF file: key/value metadata and the table of tensors, every count checked before it is used.

Layout: magic "GGUF", version, counts, then key/value metadata, then the tensor table, then aligned tensor data, all
little-endian. The `gguf` package's own reader builds an object per vocabulary entry and trusts what the file says of
itself; here a string or an array longer than the rest of the file is refused before anything is allocated for it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import CheckpointError

MAGIC = b"GGUF"
MAX_ENTRIES = 1 << 16  # metadata keys, and tensors: the largest Gemma has 808
MAX_ITEMS = 1 << 22  # array items of a file in all: five times three Gemma vocabularies of tokens, scores and types
MAX_DIMENSIONS = 4
MAX_STRING = 64 << 20  # bytes
MAX_NAME = 63  # of a tensor, as llama.cpp has it
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class TableEntry:
    """One tensor as the table states it: shape outermost first, ggml's number of its type, its first byte's place."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # from the start of the file


@dataclass(frozen=True)
class GgufHeader:
    """What one file says of itself, and how many bytes it has."""

    metadata: dict[str, Any]
    table: tuple[TableEntry, ...]
    size: int


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_header(path: Path) -> GgufHeader:
    """Read a file up to its tensor data.

    Raises:
        CheckpointError: not GGUF version 2 or 3 in little-endian order, damaged, cut short or of absurd counts.
    """
    try:
        with path.open("rb", buffering=1 << 20) as file:
            reader = _Reader(path, file)
            try:
                return reader.header()
            except UnicodeDecodeError:
                raise CheckpointError(
                    f"{path} is damaged: the text that ends at byte {reader.position} is not UTF-8"
                ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """Takes values off a file from its start; `position` is the next byte's."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self._items = 0

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise CheckpointError(f"{self._path} is not a GGUF file: it does not begin with {MAGIC!r}")
        version = self._number("I")
        if version not in (2, 3):
            swapped = version in (2 << 24, 3 << 24)
            given = "big-endian order" if swapped else f"version {version}"
            raise CheckpointError(f"{self._path} is a GGUF file of {given}, expected version 2 or 3, little-endian")
        tensors, values = self._number("Q"), self._number("Q")
        if max(tensors, values) > MAX_ENTRIES:
            raise CheckpointError(
                f"{self._path} announces {tensors} tensors and {values} metadata values, "
                f"expected at most {MAX_ENTRIES} of each"
            )
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._string()
            if key in metadata:
                raise CheckpointError(f"metadata key {shown(key)} stands twice in {self._path}")
            metadata[key] = self._value(key)
        entries = [self._entry() for _ in range(tensors)]

        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"general.alignment must be a power of two, got {shown(alignment)}: {self._path}")
        start = -(-self.position // alignment) * alignment
        table = []
        for name, shape, kind, offset in entries:
            if offset % alignment:
                raise CheckpointError(
                    f"tensor {shown(name)} begins at {offset}, no multiple of {alignment}: {self._path}"
                )
            table.append(TableEntry(name, shape, kind, start + offset))
        return GgufHeader(metadata, tuple(table), self.size)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        if len(name) > MAX_NAME:
            raise CheckpointError(f"a tensor's name must be at most {MAX_NAME} long, got {shown(name)}: {self._path}")
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(
                f"tensor {shown(name)} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}: {self._path}"
            )
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, key: str) -> Any:
        kind = self._number("I")
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"metadata {shown(key)} has the unknown type {kind}: {self._path}")
        item, count = self._number("I"), self._number("Q")
        if item != _STRING and item not in _SCALARS:
            what = "nested arrays" if item == _ARRAY else f"items of the unknown type {item}"
            raise CheckpointError(f"metadata {shown(key)} has {what}: {self._path}")
        self._items += count
        if self._items > MAX_ITEMS:
            raise CheckpointError(
                f"metadata {shown(key)} announces {count} items, expected at most {MAX_ITEMS} in all: {self._path}"
            )
        if item == _STRING:
            return [self._string() for _ in range(count)]
        form = f"<{count}{_SCALARS[item]}"
        return list(struct.unpack(form, self._take(struct.calcsize(form))))

    def _string(self) -> str:
        length = self._number("Q")
        if self.size - self.position > length > MAX_STRING:
            raise CheckpointError(
                f"{self._path} is damaged: a text of {length} bytes is announced at byte {self.position}, "
                f"expected at most {MAX_STRING}"
            )
        return self._take(length).decode("utf-8")

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self.size - self.position else b""
        if len(data) != count:
            raise CheckpointError(
                f"{self._path} is damaged or cut short: {count} bytes are announced at byte {self.position} "
                f"of {self.size}"
            )
        self.position += count
        return data


def shown(value: Any) -> str:
    """A name or value from a file as a message can hold it: on one line, and cut where it is long."""
    most = 80 if isinstance(value, str) else 8
    if isinstance(value, str | list) and len(value) > most:
        return f"{value[:most]!r} and more"
    return repr(value)

"""The header of one GGUF file: key/value metadata and the tensor table, every count checked before it is used.

Layout, little-endian: magic "GGUF", version, counts, key/value metadata, tensor table, aligned tensor data. The `gguf`
package's reader builds an object for each vocabulary entry and trusts the file; this one refuses a string or array
longer than the rest of the file before allocating anything for it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from runtime.checkpoint.files import reading
from runtime.checkpoint.stored_tensor import stamp_of
from runtime.errors import CheckpointError
from runtime.model.config_fields import shown

MAGIC = b"GGUF"
MAX_ENTRIES = 1 << 16  # of metadata, and of tensors: the largest Gemma has 808
MAX_ITEMS = 1 << 22  # array items in a file: five times the tokens, scores and types of a Gemma vocabulary
MAX_DIMENSIONS = 4
MAX_STRING = 64 << 20  # bytes
MAX_NAME = 63  # of a tensor: llama.cpp's limit
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class TableEntry:
    """One tensor in the table."""

    name: str
    shape: tuple[int, ...]  # outermost first
    ggml_type: int  # ggml's number of the type
    offset: int  # of the first byte, from the start of the file


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor table of one file, its size in bytes, and its stamp (`stamp_of`) when they were read."""

    metadata: dict[str, Any]
    table: tuple[TableEntry, ...]
    size: int
    stamp: tuple[int, ...]


def is_gguf(path: Path) -> bool:
    """Whether a file's content begins like GGUF, whatever its name.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with reading(path), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> GgufHeader:
    """Read a file up to its tensor data.

    Raises:
        CheckpointError: not little-endian GGUF version 2 or 3, damaged, truncated or of implausible counts.
    """
    with reading(path), path.open("rb", buffering=0) as raw, BufferedReader(raw, 1 << 20) as file:
        reader = _Reader(path, file)
        try:
            return reader.header()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{path} is damaged: the string that ends at byte {reader.position} is not UTF-8"
            ) from None


class _Reader:
    """Reads values from the start of a file; `position` is the next byte."""

    def __init__(self, path: Path, file: BufferedReader[FileIO]) -> None:
        self._path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self._stamp = stamp_of(file.fileno())
        self.position = 0
        self._items = 0

    def header(self) -> GgufHeader:
        if (magic := self._take(4)) != MAGIC:
            raise CheckpointError(f"{self._path} is not a GGUF file: it must begin with {MAGIC!r}, got {magic!r}")
        version = self._number("I")
        if version not in (2, 3):
            swapped = version in (2 << 24, 3 << 24)
            given = "big-endian order" if swapped else f"version {version}"
            raise CheckpointError(f"{self._path} is GGUF of {given}, expected version 2 or 3, little-endian")
        tensors, values = self._number("Q"), self._number("Q")
        if max(tensors, values) > MAX_ENTRIES:
            raise CheckpointError(
                f"{self._path} claims {tensors} tensors and {values} metadata values, "
                f"expected at most {MAX_ENTRIES} of each"
            )
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._string()
            if key in metadata:
                raise CheckpointError(f"duplicate metadata key {shown(key)} in {self._path}")
            metadata[key] = self._value(key)
        entries = [self._entry() for _ in range(tensors)]

        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"general.alignment must be a power of two, got {shown(alignment)}: {self._path}")
        start = -(-self.position // alignment) * alignment
        table = []
        for name, shape, ggml_type, offset in entries:
            if offset % alignment:
                raise CheckpointError(
                    f"tensor {shown(name)} begins at {offset}, not a multiple of {alignment}: {self._path}"
                )
            table.append(TableEntry(name, shape, ggml_type, start + offset))
        return GgufHeader(metadata, tuple(table), self.size, self._stamp)

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
        value_type = self._number("I")
        if value_type == _STRING:
            return self._string()
        if value_type in _SCALARS:
            return self._number(_SCALARS[value_type])
        if value_type != _ARRAY:
            raise CheckpointError(f"metadata {shown(key)} has the unknown type {value_type}: {self._path}")
        item_type, count = self._number("I"), self._number("Q")
        if item_type != _STRING and item_type not in _SCALARS:
            what = "nested arrays" if item_type == _ARRAY else f"items of the unknown type {item_type}"
            raise CheckpointError(f"metadata {shown(key)} has {what}: {self._path}")
        self._items += count
        if self._items > MAX_ITEMS:
            raise CheckpointError(
                f"metadata {shown(key)} claims {count} items, expected at most {MAX_ITEMS} in all: {self._path}"
            )
        if item_type == _STRING:
            return self._strings(count)
        form = f"<{count}{_SCALARS[item_type]}"
        return list(struct.unpack(form, self._take(struct.calcsize(form))))

    def _strings(self, count: int) -> list[str]:
        """What `count` calls of `_string` give, but strings in the file's buffer are decoded in one go: a vocabulary
        has 262,144."""
        found: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        while len(found) < count:
            buffered, at = self._file.peek(), 0
            available = len(buffered)
            try:
                for _ in range(count - len(found)):
                    start = at + 8
                    if start > available or (end := start + length_at(buffered, at)[0]) > available:
                        break
                    at = end
                    found.append(buffered[start:end].decode())
            finally:
                self._take(at)
            if len(found) < count:
                found.append(self._string())
        return found

    def _string(self) -> str:
        length = self._number("Q")
        if self.size - self.position > length > MAX_STRING:
            raise CheckpointError(
                f"{self._path} is damaged: byte {self.position} claims a string of {length} bytes, "
                f"expected at most {MAX_STRING}"
            )
        return self._take(length).decode("utf-8")

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self.size - self.position else b""
        if len(data) != count:
            raise CheckpointError(
                f"{self._path} is damaged or truncated: byte {self.position} of {self.size} claims {count} bytes"
            )
        self.position += count
        return data

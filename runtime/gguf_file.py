"""A GGUF file: its metadata and tensor table, and its tensors dequantised a few rows at a time.

Layout: magic "GGUF", version, counts, then key/value metadata, then the tensor table, then aligned tensor data, all
little-endian. The `gguf` package turns quantised blocks into numbers; its own reader builds an object per vocabulary
entry and takes seconds for what is read here in a fraction of one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import CheckpointError

SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K")
CHUNK_ELEMENTS = 8 << 20
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table: its ggml type ("Q4_K"), its shape (outermost first), and its bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


class GgufFile:
    """Metadata and tensor table of a GGUF file, read and checked against the file's size.

    Args:
        path: the file.

    Raises:
        CheckpointError: not GGUF, cut short, of an unknown version, or with tensors of an unsupported type.
        ModuleNotFoundError: the `gguf` package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        if self.size < 24:
            raise CheckpointError(f"{path} is not a GGUF file: {self.size} bytes")
        self._data = np.memmap(path, mode="r")
        self._position = 0
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short near byte {self._position} of {self.size}"
            ) from error

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor as float32 rows, some at a time: arrays [rows, columns] ([1, size] of a vector)."""
        from gguf import GGMLQuantizationType, dequantize

        tensor = self.tensors[name]
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.bytes // rows
        step = max(1, CHUNK_ELEMENTS // columns)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            raw = np.array(self._data[tensor.offset + start * row_bytes : tensor.offset + stop * row_bytes])
            if tensor.kind in ("F32", "F16"):  # `dequantize` wants these typed already
                numbers = raw.view(np.float32 if tensor.kind == "F32" else np.float16).astype(np.float32)
                yield numbers.reshape(stop - start, columns)
            else:
                yield dequantize(raw.reshape(stop - start, row_bytes), GGMLQuantizationType[tensor.kind])

    def _read(self) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        magic, version = self._take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise CheckpointError(f"{self.path} is not a GGUF file of version 2 or 3")
        tensor_count, value_count = self._take("QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self._string()
            self.metadata[key] = self._value(self._take("I")[0])

        table = []
        for _ in range(tensor_count):
            name = self._string()
            (dimensions,) = self._take("I")
            shape = tuple(reversed(self._take(f"{dimensions}Q")))
            kind, offset = self._take("IQ")
            table.append((name, shape, kind, offset))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._position // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in table:
            kind = GGMLQuantizationType(number).name if number in iter(GGMLQuantizationType) else str(number)
            if kind not in SUPPORTED:
                raise CheckpointError(f"tensor {name} is stored as {kind}, expected one of {SUPPORTED}: {self.path}")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
            if not shape or 0 in shape or shape[-1] % block:
                raise CheckpointError(f"tensor {name} has shape {list(shape)}, which {kind} cannot store: {self.path}")
            tensor = GgufTensor(kind, shape, start + offset, math.prod(shape) // block * block_bytes)
            if tensor.offset + tensor.bytes > self.size:
                raise CheckpointError(
                    f"{self.path} is cut short: tensor {name} ends at byte {tensor.offset + tensor.bytes}, "
                    f"the file has {self.size}"
                )
            self.tensors[name] = tensor

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._data.data, self._position)
        self._position += struct.calcsize("<" + form)
        return values

    def _string(self) -> str:
        (length,) = self._take("Q")
        return self._take(f"{length}s")[0].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])[0]
        item, count = self._take("IQ")
        if item in (_STRING, _ARRAY):
            return [self._value(item) for _ in range(count)]
        return list(self._take(f"{count}{_SCALARS[item]}"))

"""A GGUF model: metadata and tensors, from one file or from all files of a split one.

The `gguf` package dequantises, a few rows at a time.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from runtime.checkpoint.files import reading
from runtime.checkpoint.gguf.header import GgufHeader, TableEntry, read_header
from runtime.checkpoint.stored_tensor import stamp_of
from runtime.errors import CheckpointError
from runtime.model.config_fields import shown

# The types that `gguf.dequantize` supports. Rows that are not a multiple of 256 (as in Gemma 3's 270M and 1B) are Q5_0,
# Q5_1, Q8_0 or IQ4_NL, even in files named after a K-quant.
SUPPORTED = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
    *("MXFP4", "NVFP4"),
)
CHUNK_ELEMENTS = 8 << 20
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[^.]*)?", re.DOTALL)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type ("Q4_K"), its shape (outermost first), and where it is stored: in a file of this stamp."""

    ggml_type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    path: Path
    stamp: tuple[int, ...]

    @contextmanager
    def opened(self) -> Iterator[FileIO]:
        """The file, at the tensor's first byte.

        Raises:
            CheckpointError: the file cannot be read, has changed since its header was read, or changes within the
                context.
        """
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            self._check_unchanged(file)
            file.seek(self.offset)
            yield file
            self._check_unchanged(file)

    def _check_unchanged(self, file: FileIO) -> None:
        if stamp_of(file.fileno()) != self.stamp:
            raise CheckpointError(f"{self.path} has changed since its header was read")


class GgufFile:
    """Metadata and tensors of a GGUF file or of a split one, checked against the files' sizes.

    Args:
        path: the file, or any shard of a split one.
        known: its tensors, if a file of this content has been checked before; its headers are then not read.

    Raises:
        CheckpointError: not GGUF, damaged, truncated, of an unknown version; tensors of an unsupported type, duplicate
            or overlapping; or a shard of a split file without the others.
        ModuleNotFoundError: the `gguf` package is not installed.
    """

    def __init__(self, path: Path, known: Mapping[str, GgufTensor] | None = None) -> None:
        self.path = path
        self.tensors: dict[str, GgufTensor] = dict(known or {})
        if known is None:
            self._read(path)

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """Key/value metadata, that of the first shard."""
        return read_header(shards_of(self.path)[0]).metadata

    def _read(self, path: Path) -> None:
        headers = {shard: read_header(shard) for shard in shards_of(path)}
        self.metadata = next(iter(headers.values())).metadata
        for number, (shard, header) in enumerate(headers.items()):
            _check_shard(shard, header, number, len(headers))
            self._add(shard, header)
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(headers) > 1 and expected != len(self.tensors):
            raise CheckpointError(f"the shards of {path} must have {shown(expected)} tensors, got {len(self.tensors)}")

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor as float32 arrays [some rows, columns] ([1, size] for a vector).

        Raises:
            CheckpointError: the file cannot be read, or has changed since it was opened.
        """
        tensor = self.tensors[name]
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.bytes // rows
        step = max(1, CHUNK_ELEMENTS // columns)
        with tensor.opened() as file:
            for start in range(0, rows, step):
                count = min(step, rows - start)
                raw = np.fromfile(file, np.uint8, count * row_bytes)
                if raw.size != count * row_bytes:
                    raise CheckpointError(f"{tensor.path} was truncated while tensor {name} was read")
                yield _dequantised(raw, tensor.ggml_type).reshape(count, columns)

    def _add(self, path: Path, header: GgufHeader) -> None:
        end = 0
        for entry in sorted(header.table, key=lambda entry: entry.offset):
            tensor = _tensor(path, entry, header)
            if entry.name in self.tensors:
                raise CheckpointError(f"duplicate tensor {entry.name!r} in {path}")
            if tensor.offset < end:
                raise CheckpointError(
                    f"tensor {entry.name!r} begins at byte {tensor.offset}, inside another that ends at {end}: {path}"
                )
            self.tensors[entry.name] = tensor
            end = tensor.offset + tensor.bytes


def shards_of(path: Path) -> list[Path]:
    """The files of a GGUF model, in order: the file itself, or all shards of a split one, recognised by its
    name, `NAME-00001-of-00003.gguf`.

    Raises:
        CheckpointError: a shard is missing.
    """
    named = _SPLIT_NAME.fullmatch(path.name)
    if named is None:
        return [path]
    count, number = int(named["count"]), int(named["number"])
    if not 1 <= number <= count:
        raise CheckpointError(f"{path} must be numbered from 1 to {count}, got {number}")
    stem, suffix = named["stem"], named["suffix"] or ""
    shards = [path.with_name(f"{stem}-{index:05d}-of-{count:05d}{suffix}") for index in range(1, count + 1)]
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{path} is shard {number} of {count}, but there is no {shard.name} beside it")
    return shards


def _check_shard(path: Path, header: GgufHeader, number: int, count: int) -> None:
    """Compare a shard's number and count with those of its file name."""
    given = (header.metadata.get("split.no", 0), header.metadata.get("split.count", 1) or 1)
    if given == (number, count):
        return
    if count == 1:
        raise CheckpointError(
            f"{path} is a shard of a split model (split.no {shown(given[0])}, split.count {shown(given[1])}): "
            "its shards must be in one folder, named NAME-00001-of-0000N.gguf"
        )
    raise CheckpointError(
        f"{path} must be shard {number + 1} of {count}, got split.no {shown(given[0])}, split.count {shown(given[1])}"
    )


def _tensor(path: Path, entry: TableEntry, header: GgufHeader) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, number = entry.name, entry.shape, entry.ggml_type
    ggml_type = next((known.name for known in GGMLQuantizationType if known == number), str(number))
    if ggml_type not in SUPPORTED:
        raise CheckpointError(f"tensor {name!r} is stored as {ggml_type}, expected one of {SUPPORTED}: {path}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    if 0 in shape or shape[-1] % block:
        raise CheckpointError(f"tensor {name!r} has shape {list(shape)}, which {ggml_type} cannot store: {path}")
    while len(shape) > 1 and shape[0] == 1:  # a vector may be written as a matrix of one row
        shape = shape[1:]
    stored = math.prod(shape) // block * block_bytes
    if entry.offset + stored > header.size:
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {entry.offset + stored}, the file has {header.size}"
        )
    return GgufTensor(ggml_type, shape, entry.offset, stored, path, header.stamp)


def _dequantised(raw: np.ndarray, ggml_type: str) -> np.ndarray:
    """The bytes of whole blocks as float32."""
    if ggml_type in ("F32", "F16"):  # `dequantize` expects these typed, not as bytes
        return raw.view(np.float32 if ggml_type == "F32" else np.float16).astype(np.float32)
    from gguf import GGMLQuantizationType, dequantize

    try:
        with np.errstate(all="ignore"):  # the conversion refuses non-finite values and names the tensor
            return dequantize(raw.reshape(1, -1), GGMLQuantizationType[ggml_type])
    except NotImplementedError as error:
        raise CheckpointError(f"the installed gguf package cannot dequantise {ggml_type}") from error

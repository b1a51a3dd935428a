"""A GGUF model: its metadata and tensors, from one file or from all the parts of a split one.

The `gguf` package turns quantised blocks into numbers, a few rows at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.checkpoint.gguf.header import GgufHeader, TableEntry, read_header, shown
from runtime.errors import CheckpointError

# What `gguf.dequantize` turns into numbers. Rows that are no multiple of 256 (Gemma 3's 270M and 1B have them) hold
# Q5_0, Q5_1, Q8_0 or IQ4_NL in files named after a K-quant.
SUPPORTED = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
    *("MXFP4", "NVFP4"),
)
CHUNK_ELEMENTS = 8 << 20
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[^.]*)?", re.DOTALL)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its ggml type ("Q4_K"), its shape (outermost first), and the bytes of a file that hold it."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    path: Path


class GgufFile:
    """Metadata and tensors of a GGUF file, checked against its size; of a split file, of all its parts.

    Args:
        path: the file, or any part of a split one.

    Raises:
        CheckpointError: not GGUF, damaged, cut short, of an unknown version, with tensors of an unsupported type, twice
            or over each other, or a part of a split file whose other parts are not beside it.
        ModuleNotFoundError: the `gguf` package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        headers = {part: read_header(part) for part in split_parts(path)}
        self.metadata = next(iter(headers.values())).metadata
        self.tensors: dict[str, GgufTensor] = {}
        for number, (part, header) in enumerate(headers.items()):
            _check_part(part, header, number, len(headers))
            self._add(part, header)
        announced = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(headers) > 1 and announced != len(self.tensors):
            raise CheckpointError(
                f"{path} and its parts have {len(self.tensors)} tensors, announced are {shown(announced)}"
            )

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor as float32 rows, some at a time: arrays [rows, columns] ([1, size] of a vector).

        Raises:
            CheckpointError: the file cannot be read, or has become shorter since it was opened.
        """
        tensor = self.tensors[name]
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.bytes // rows
        step = max(1, CHUNK_ELEMENTS // columns)
        try:
            with tensor.path.open("rb") as file:
                file.seek(tensor.offset)
                for start in range(0, rows, step):
                    count = min(step, rows - start)
                    raw = np.fromfile(file, np.uint8, count * row_bytes)
                    if raw.size != count * row_bytes:
                        raise CheckpointError(f"{tensor.path} was cut short while tensor {name} was read")
                    yield _numbers(raw, tensor.kind).reshape(count, columns)
        except OSError as error:
            raise CheckpointError(f"{tensor.path} cannot be read: {error.strerror}") from error

    def _add(self, path: Path, header: GgufHeader) -> None:
        end = 0
        for entry in sorted(header.table, key=lambda entry: entry.offset):
            tensor = _tensor(path, entry, header.size)
            if entry.name in self.tensors:
                raise CheckpointError(f"tensor {entry.name!r} stands twice in {path}")
            if tensor.offset < end:
                raise CheckpointError(
                    f"tensor {entry.name!r} begins at byte {tensor.offset}, inside another that ends at {end}: {path}"
                )
            self.tensors[entry.name] = tensor
            end = tensor.offset + tensor.bytes


def split_parts(path: Path) -> list[Path]:
    """The files that a GGUF model consists of, in order: the file itself, or all parts of a split one.

    A part is known by its name, `NAME-00001-of-00003.gguf`.

    Raises:
        CheckpointError: a part is not there.
    """
    named = _SPLIT_NAME.fullmatch(path.name)
    if named is None:
        return [path]
    count, number = int(named["count"]), int(named["number"])
    if not 1 <= number <= count:
        raise CheckpointError(f"{path} calls itself part {number} of {count}")
    stem, suffix = named["stem"], named["suffix"] or ""
    parts = [path.with_name(f"{stem}-{index:05d}-of-{count:05d}{suffix}") for index in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{path} is part {number} of {count}, but there is no {part.name} beside it")
    return parts


def _check_part(path: Path, header: GgufHeader, number: int, count: int) -> None:
    """Compare what a file says of its place among the parts with what its name says."""
    said = (header.metadata.get("split.no", 0), header.metadata.get("split.count", 1) or 1)
    if said == (number, count):
        return
    if count == 1:
        raise CheckpointError(
            f"{path} is part of a split model (split.no {shown(said[0])}, split.count {shown(said[1])}): "
            "its parts must lie in one folder, named NAME-00001-of-0000N.gguf"
        )
    raise CheckpointError(
        f"{path} must be part {number + 1} of {count}, but has split.no {shown(said[0])}, split.count {shown(said[1])}"
    )


def _tensor(path: Path, entry: TableEntry, size: int) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, number = entry.name, entry.shape, entry.kind
    kind = next((known.name for known in GGMLQuantizationType if known == number), str(number))
    if kind not in SUPPORTED:
        raise CheckpointError(f"tensor {name!r} is stored as {kind}, expected one of {SUPPORTED}: {path}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    if 0 in shape or shape[-1] % block:
        raise CheckpointError(f"tensor {name!r} has shape {list(shape)}, which {kind} cannot store: {path}")
    while len(shape) > 1 and shape[0] == 1:  # a vector may be written as a matrix of one row
        shape = shape[1:]
    stored = math.prod(shape) // block * block_bytes
    if entry.offset + stored > size:
        raise CheckpointError(
            f"{path} is cut short: tensor {name!r} ends at byte {entry.offset + stored}, the file has {size}"
        )
    return GgufTensor(kind, shape, entry.offset, stored, path)


def _numbers(raw: np.ndarray, kind: str) -> np.ndarray:
    """The float32 numbers in whole blocks of a type, given as bytes."""
    from gguf import GGMLQuantizationType, dequantize

    if kind in ("F32", "F16"):  # `dequantize` wants these typed already
        return raw.view(np.float32 if kind == "F32" else np.float16).astype(np.float32)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused by name when it is written
            return dequantize(raw.reshape(1, -1), GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise CheckpointError(f"the installed gguf package cannot dequantise {kind}") from error

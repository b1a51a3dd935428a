"""The safetensors files of a folder: every header checked before any tensor is read, tensors read slice by slice, so
that reading never holds more than a slice beside the destination.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), then the raw data.
Only safetensors are read. Pickle checkpoints can run code when loaded and are refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.folder_contents import describe
from runtime.errors import CheckpointError, ModelNotFound

SLICE_BYTES = 16 << 20
JSON_LIMIT = 100_000_000  # bytes of a JSON file or header; what the safetensors library allows
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # what weights may be stored as
_ITEM_BITS = (
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64"), 64)
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its name and dtype there ("BF16"), its shape, its first byte, and what tells
    the file from one that has since been put in its place."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stamp: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BITS[self.dtype] // 8

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that it can be read as a weight of this shape.

        Raises:
            CheckpointError: its shape or dtype is another one.
        """
        if self.shape != shape:
            raise CheckpointError(
                f"tensor {self.name} must have shape {list(shape)}, got {list(self.shape)}: {self.file}"
            )
        if self.dtype not in _DTYPES:
            note = "" if self.dtype == "F64" else " (a quantised checkpoint: load the one that it was made from)"
            raise CheckpointError(
                f"tensor {self.name} is stored as {self.dtype}, expected one of {sorted(_DTYPES)}{note}: {self.file}"
            )

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Read it, converting to the destination's dtype and device.

        Args:
            destination: same shape, contiguous; overwritten.
            progress: called with the number of stored bytes after each slice.

        Raises:
            CheckpointError: a value is not finite, as stored or in the destination's dtype; or the file cannot be
                read, or has changed since its header was.
        """
        for start, rows in self._slices():
            target = destination[start : start + len(rows)]
            target.copy_(rows)
            # A NaN or an infinity is an extreme too, and aminmax is some forty times faster than isfinite on a CPU.
            if not all(math.isfinite(extreme) for extreme in torch.aminmax(target)):
                stored = all(math.isfinite(extreme) for extreme in torch.aminmax(rows))
                reason = f"overflows {target.dtype}" if stored else "holds a value that is not finite"
                raise CheckpointError(f"tensor {self.name} {reason}: {self.file}")
            if progress is not None:
                progress(rows.nbytes)

    def equals(self, other: StoredTensor, dtype: torch.dtype) -> bool:
        """Whether two tensors of one shape hold the same values once they are converted to `dtype`."""
        slices = zip(self._slices(), other._slices(), strict=True)
        return all(torch.equal(mine.to(dtype), theirs.to(dtype)) for (_, mine), (_, theirs) in slices)

    def _slices(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, rows). The rows lie in one buffer, which the next slice overwrites. They are read, since a
        map of a file that is cut short meanwhile kills the process."""
        row_items = math.prod(self.shape[1:])
        step = max(1, SLICE_BYTES // (4 * row_items))  # whatever the dtype, so that `equals` can pair slices
        dtype = _DTYPES[self.dtype]
        buffer = torch.empty(min(step, self.shape[0]) * row_items, dtype=dtype)
        with _reading(self.file), self.file.open("rb", buffering=0) as file:
            if _stamp(file.fileno()) != self.stamp:
                raise CheckpointError(f"{self.file} has changed since its header was read")
            file.seek(self.start)
            for start in range(0, self.shape[0], step):
                rows = buffer[: min(step, self.shape[0] - start) * row_items]
                _fill(file, rows.view(torch.uint8).numpy().data, self.file)
                yield start, rows.view(-1, *self.shape[1:])


class Checkpoint:
    """The tensors of a checkpoint folder, single-file or sharded.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the shards it names.

    Raises:
        ModelNotFound: the folder has no safetensors checkpoint; the message says what it has.
        CheckpointError: a shard that is missing, outside the folder or not as the index says; a file that cannot be
            read, is cut short or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        index = folder / "model.safetensors.index.json"
        if is_file(folder / "model.safetensors"):
            self.tensors = _read_header(folder / "model.safetensors")
        elif is_file(index):
            self.tensors = _read_shards(folder, _weight_map(index))
        else:
            raise ModelNotFound(f"no model.safetensors or model.safetensors.index.json in {folder}: {describe(folder)}")


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    return weight_map


def _read_shards(folder: Path, weight_map: dict[str, Any]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if "\0" in shard or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"the index names {shard!r}, expected a .safetensors file in the checkpoint's folder")
        if not is_file(folder / shard):
            raise CheckpointError(f"the index names {shard}, which is not in {folder}")
        for name, stored in _read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{shard} holds tensor {name}, which the index does not place there")
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name} is missing from {shard}, where the index places it")
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with _reading(path), path.open("rb") as file:
        stamp = _stamp(file.fileno())
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, JSON_LIMIT):
            raise CheckpointError(f"{path} is not a safetensors file, or is cut short: {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        note = header.pop("__metadata__", None)
        if note is not None and not all(isinstance(value, str) for value in note.values()):
            raise ValueError("__metadata__ holds more than strings")
        entries = sorted(_entry(name, entry) for name, entry in header.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is not a safetensors file: its header cannot be read") from None
    tensors, end = {}, 0
    for begin, stop, name, dtype, shape in entries:
        if dtype not in _ITEM_BITS:
            raise CheckpointError(f"tensor {name} is stored as {dtype}, which is no dtype of safetensors: {path}")
        if begin != end or 8 * (stop - begin) != math.prod(shape) * _ITEM_BITS[dtype]:
            raise CheckpointError(f"the header of {path} is inconsistent at tensor {name}")
        tensors[name], end = StoredTensor(name, path, dtype, shape, 8 + length + begin, stamp), stop
    if size != 8 + length + end:
        raise CheckpointError(f"{path} is cut short or overlong: its header says {8 + length + end} bytes, got {size}")
    return tensors


def _entry(name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of a header's entry; any built-in error says that it is malformed."""
    (begin, stop), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    numbers = (begin, stop, *shape)
    if not isinstance(dtype, str) or len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(name)
    return begin, stop, name, dtype, shape


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Raises:
        CheckpointError: it does not, or cannot be read.
    """
    if not is_file(path):
        raise CheckpointError(f"{path} is not there")
    with _reading(path), path.open("rb") as file:
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


def is_file(path: Path) -> bool:
    """Whether there is a file to read.

    Raises:
        CheckpointError: what has this name is no file (a folder, a pipe, a broken link), or may not be looked at.
    """
    with _reading(path):
        if path.is_file():
            return True
        if os.path.lexists(path):
            raise CheckpointError(f"{path} is not a file" + (", but a broken link" if path.is_symlink() else ""))
    return False


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _fill(file: Any, view: memoryview, path: Path) -> None:
    """Reads exactly as many bytes as fit the view."""
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{path} has been cut short since its header was read")
        view = view[count:]


def _stamp(descriptor: int) -> tuple[int, ...]:
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

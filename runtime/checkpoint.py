"""The safetensors files of a folder: every header checked before any tensor is read, tensors copied through a
memory map in slices, so that reading never holds more than a slice beside the destination.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), then the raw data.
Only safetensors are read. Pickle checkpoints can run code when loaded and are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from runtime.errors import CheckpointError, ModelNotFound

SLICE_BYTES = 16 << 20
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its dtype as safetensors names it ("BF16") and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class Checkpoint:
    """The tensors of a checkpoint folder, single-file or sharded.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the shards it names.

    Raises:
        FileNotFoundError: the folder has no safetensors checkpoint.
        CheckpointError: pickle files only; a shard that is missing, outside the folder or not as the index says;
            a file that is cut short or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").is_file():
            self.tensors = _read_header(folder / "model.safetensors")
        elif index.is_file():
            self.tensors = _read_shards(folder, _weight_map(index))
        else:
            pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
            if pickles:
                raise CheckpointError(f"{folder} has only pickle weights ({pickles[0]}): safetensors are required")
            raise ModelNotFound(f"no model.safetensors or model.safetensors.index.json in {folder}")

    def check_shapes(self, expected: dict[str, tuple[int, ...]], ignored: Callable[[str], bool]) -> None:
        """Compare the stored tensors with what a model needs.

        Args:
            expected: name -> shape of every tensor that must be there.
            ignored: tells of a name that is not expected whether it is known and skipped.

        Raises:
            CheckpointError: a tensor is missing, surplus or misshapen; it is named.
        """
        missing = [name for name in expected if name not in self.tensors]
        surplus = [name for name in self.tensors if name not in expected and not ignored(name)]
        for names, what in ((missing, "missing"), (surplus, "not part of this model")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise CheckpointError(f"tensor {names[0]}{more} is {what}: {self.folder}")
        for name, shape in expected.items():
            if self.tensors[name].shape != shape:
                raise CheckpointError(
                    f"tensor {name} must have shape {list(shape)}, got {list(self.tensors[name].shape)}"
                )

    def copy_into(self, destination: torch.Tensor, name: str, progress: Callable[[int], None] | None = None) -> None:
        """Copy a tensor, converting to the destination's dtype and device.

        Args:
            destination: same shape as the stored tensor, contiguous; overwritten.
            name: the tensor's name.
            progress: called with the number of stored bytes after each slice.

        Raises:
            CheckpointError: a value is not finite, as stored or in the destination's dtype.
        """
        for start, rows in self._slices(name):
            target = destination[start : start + len(rows)]
            target.copy_(rows)
            # A NaN or an infinity is an extreme too, and aminmax is some forty times faster than isfinite on a CPU.
            if not all(math.isfinite(extreme) for extreme in torch.aminmax(target)):
                stored = all(math.isfinite(extreme) for extreme in torch.aminmax(rows))
                reason = f"overflows {target.dtype}" if stored else "holds a value that is not finite"
                raise CheckpointError(f"tensor {name} {reason}: {self.tensors[name].file}")
            if progress is not None:
                progress(rows.nbytes)

    def equal(self, name: str, other: str) -> bool:
        """Whether two stored tensors hold the same values."""
        if self.tensors[name].shape != self.tensors[other].shape:
            return False
        rows = zip(self._slices(name), self._slices(other), strict=False)
        return all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in rows)

    def _slices(self, name: str):
        """Yield (first row, rows) of a stored tensor. Each slice has its own memory map, so that the pages of one
        slice are given back before the next is touched: they would count as this process's memory."""
        stored = self.tensors[name]
        row_bytes = max(1, stored.bytes // stored.shape[0])
        step = max(1, SLICE_BYTES // row_bytes)
        for start in range(0, stored.shape[0], step):
            with safe_open(stored.file, framework="pt") as file:
                yield start, file.get_slice(name)[start : start + step]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    return weight_map


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"the index names {shard!r}, expected a .safetensors file in the checkpoint's folder")
        if not (folder / shard).is_file():
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
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path} is not a safetensors file, or is cut short: {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [(*e["data_offsets"], name, e["dtype"], tuple(e["shape"])) for name, e in header.items()]
            entries.sort()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{path} is not a safetensors file: its header cannot be read") from None
    tensors, end = {}, 0
    for begin, stop, name, dtype, shape in entries:
        if dtype not in _ITEM_BYTES:
            raise CheckpointError(f"tensor {name} is stored as {dtype}, expected one of {sorted(_ITEM_BYTES)}: {path}")
        stored = StoredTensor(path, dtype, shape)
        if begin != end or stop - begin != stored.bytes:
            raise CheckpointError(f"the header of {path} is inconsistent at tensor {name}")
        tensors[name], end = stored, stop
    if size != 8 + length + end:
        raise CheckpointError(f"{path} is cut short or overlong: its header says {8 + length + end} bytes, got {size}")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Raises:
        CheckpointError: it does not.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value

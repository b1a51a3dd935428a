"""The safetensors files of a folder, every header checked before any tensor is read.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), then the raw data.
Pickle checkpoints can run code when loaded and are refused.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from runtime.checkpoint.files import JSON_LIMIT, is_file, read_json, reading
from runtime.checkpoint.folder_contents import describe
from runtime.checkpoint.stored_tensor import ITEM_BITS, StoredTensor, stamp_of
from runtime.errors import CheckpointError, ModelNotFound


class Checkpoint:
    """The tensors of a checkpoint folder, single-file or sharded.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the shards it names.

    Raises:
        ModelNotFound: the folder has no safetensors checkpoint; the message says what it has.
        CheckpointError: a shard is missing, outside the folder or not as the index says; a file is unreadable,
            truncated or not safetensors.
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
    with reading(path), path.open("rb") as file:
        stamp = stamp_of(file.fileno())
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, JSON_LIMIT):
            raise CheckpointError(f"{path} is not a safetensors file, or truncated: {size} bytes")
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
        if dtype not in ITEM_BITS:
            raise CheckpointError(f"tensor {name} is stored as {dtype}, which is not a safetensors dtype: {path}")
        if begin != end or 8 * (stop - begin) != math.prod(shape) * ITEM_BITS[dtype]:
            raise CheckpointError(f"the header of {path} is inconsistent at tensor {name}")
        tensors[name], end = StoredTensor(name, path, dtype, shape, 8 + length + begin, stamp), stop
    if size != 8 + length + end:
        raise CheckpointError(f"{path} must have {8 + length + end} bytes according to its header, got {size}")
    return tensors


def _entry(name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of a header's entry. Any built-in exception means that it is malformed."""
    (begin, stop), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    numbers = (begin, stop, *shape)
    is_sane = name.isprintable() and len(shape) <= 64  # names appear in messages of one line
    if not isinstance(dtype, str) or not is_sane or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(name)
    return begin, stop, name, dtype, shape


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("duplicate name in an object")
    return unique

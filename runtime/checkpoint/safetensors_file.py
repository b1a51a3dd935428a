"""Writes a safetensors file, some rows at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.stored_tensor import ITEM_BITS
from runtime.errors import CacheError

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # the stored dtype ("BF16") and shape of each tensor, by name


def write(path: Path, tensors: Layout, data: Iterable[torch.Tensor]) -> None:
    """Write a file, and wait until it is on disk.

    Args:
        path: the file.
        tensors: in the order of their data.
        data: their rows in that order, contiguous on a CPU.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + size({name: (dtype, shape)})
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensor data starts aligned
    with path.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for rows in data:
            output.write(rows.view(torch.uint8).numpy().data)
        output.flush()
        os.fsync(output.fileno())


def size(tensors: Layout) -> int:
    """Bytes of the tensors' data."""
    return sum(math.prod(shape) * ITEM_BITS[dtype] // 8 for dtype, shape in tensors.values())


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to write so many bytes where they do not fit.

    Raises:
        CacheError: they do not.
    """
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise CacheError(f"{1.1 * needed / 1e6:,.0f} MB of disk are needed, {free / 1e6:,.0f} MB are free")

"""One tensor in a safetensors file, read slice by slice, so that only one slice is held besides the destination."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.files import reading
from runtime.errors import CheckpointError

SLICE_BYTES = 16 << 20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of weights
# Of weights, of blocks, and of a container's integers.
_READ = _DTYPES | {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
ITEM_BITS = (
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64"), 64)
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its stored name, dtype ("BF16") and shape, first byte, and the file's stamp."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stamp: tuple[int, ...]

    blocks = None  # a safetensors file holds values alone

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that it can be read as a weight of this shape.

        Raises:
            CheckpointError: another shape, or an unsupported dtype.
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
            CheckpointError: a value is not finite, as stored or in the destination's dtype; the file cannot be read, or
                has changed since its header was read.
        """
        for start, rows in self._slices():
            target = destination[start : start + len(rows)]
            target.copy_(rows)
            self._check_finite(target, rows)
            if progress is not None:
                progress(rows.nbytes)

    def rows(self) -> Iterator[torch.Tensor]:
        """Its values in fp32, some rows at a time.

        Raises:
            CheckpointError: as `copy_into`.
        """
        for _, rows in self._slices():
            values = rows.float()
            self._check_finite(values, rows)
            yield values

    def read(self) -> torch.Tensor:
        """All of it, as stored; nothing is checked.

        Raises:
            CheckpointError: the file cannot be read, or has changed since its header was read.
        """
        found = torch.empty(self.shape, dtype=_READ[self.dtype], device="cpu")
        for start, rows in self._slices():
            found[start : start + len(rows)] = rows
        return found

    def equals(self, other: object, dtype: torch.dtype) -> bool:
        """Whether another tensor of the same shape has equal values once converted to `dtype`, and is stored as values
        too."""
        if not isinstance(other, StoredTensor):
            return False
        slices = zip(self._slices(), other._slices(), strict=True)
        return all(torch.equal(mine.to(dtype), theirs.to(dtype)) for (_, mine), (_, theirs) in slices)

    def _check_finite(self, target: torch.Tensor, rows: torch.Tensor) -> None:
        # aminmax propagates NaN and infinity, and is some forty times faster than isfinite on a CPU.
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(target)):
            stored = all(math.isfinite(extreme) for extreme in torch.aminmax(rows))
            reason = f"overflows {target.dtype}" if stored else "holds a value that is not finite"
            raise CheckpointError(f"tensor {self.name} {reason}: {self.file}")

    def _slices(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, rows), the rows in a buffer that the next slice overwrites. Not memory-mapped: if the file
        were truncated meanwhile, the process would be killed."""
        row_items = math.prod(self.shape[1:])
        step = max(1, SLICE_BYTES // (4 * row_items))  # the same for every dtype, so that `equals` can pair slices
        dtype = _READ[self.dtype]
        buffer = torch.empty(min(step, self.shape[0]) * row_items, dtype=dtype, device="cpu")
        with reading(self.file), self.file.open("rb", buffering=0) as file:
            if stamp_of(file.fileno()) != self.stamp:
                raise CheckpointError(f"{self.file} has changed since its header was read")
            file.seek(self.start)
            for start in range(0, self.shape[0], step):
                rows = buffer[: min(step, self.shape[0] - start) * row_items]
                fill(file, rows.view(torch.uint8).numpy().data, self.file)
                yield start, rows.view(-1, *self.shape[1:])


def stamp_of(file: int | Path) -> tuple[int, ...]:
    """Identifies the content of a file, by its descriptor or path: changed or replaced files have another stamp."""
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def fill(file: Any, view: memoryview, path: Path) -> None:
    """Reads exactly as many bytes as fit the view."""
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{path} has been truncated since its header was read")
        view = view[count:]

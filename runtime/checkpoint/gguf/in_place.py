"""A decoder's weights in a GGUF file, read from the file itself: as its blocks, or as their values in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from runtime.checkpoint.files import read_json
from runtime.checkpoint.gguf.file import GgufFile, GgufTensor
from runtime.checkpoint.gguf.names import decoder_names, is_norm
from runtime.checkpoint.stored_tensor import fill
from runtime.errors import CheckpointError
from runtime.kernels.cpu.block_formats import COLUMNS, FORMATS, Format
from runtime.kernels.cpu.block_layout import kept

SLICE_BYTES = 512 << 10  # of blocks: they stay in a core's cache while they are rearranged
_EXPONENT = 0x7C00  # of an fp16 number; all of its bits are set in an infinity or a NaN


@dataclass(frozen=True)
class InPlaceTensor:
    """A tensor, by its name in the file."""

    name: str
    source: GgufFile

    @property
    def tensor(self) -> GgufTensor:
        return self.source.tensors[self.name]

    @property
    def file(self) -> Path:
        return self.tensor.path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    @property
    def dtype(self) -> str:
        return self.tensor.ggml_type

    @property
    def bytes(self) -> int:
        return self.tensor.bytes

    @property
    def blocks(self) -> Blocks | None:
        """Its blocks, if it is a matrix in a format that kernels read."""
        form, shape = FORMATS.get(self.dtype), self.tensor.shape
        return Blocks(self.name, form, self.tensor) if form and len(shape) == 2 and shape[1] % COLUMNS == 0 else None

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that it can be read as a weight of this shape.

        Raises:
            CheckpointError: it has another shape.
        """
        if self.tensor.shape != shape:
            raise CheckpointError(
                f"tensor {self.name} must have shape {list(shape)}, got {list(self.tensor.shape)}: {self.file}"
            )

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Read its values; for a norm, less 1.

        Args:
            destination: fp32 of the same shape, contiguous; overwritten.
            progress: called with the number of stored bytes after each slice.

        Raises:
            CheckpointError: as `rows`.
        """
        flat, start = destination.view(-1), 0
        for rows in self.rows():
            flat[start : start + rows.numel()] = rows.view(-1)
            start += rows.numel()
            if progress is not None:
                progress(self.bytes * rows.numel() // destination.numel())

    def rows(self) -> Iterator[torch.Tensor]:
        """Its values in fp32, some rows at a time; for a norm, less 1.

        Raises:
            CheckpointError: a value is not finite; the file cannot be read, or has changed since its header was read.
        """
        for rows in self.source.rows(self.name):
            values = torch.from_numpy(rows - 1 if is_norm(self.name) else rows)
            if not all(math.isfinite(extreme) for extreme in torch.aminmax(values)):
                raise CheckpointError(f"tensor {self.name} holds a value that is not finite: {self.file}")
            yield values

    def equals(self, other: InPlaceTensor, dtype: torch.dtype) -> bool:
        """Whether two tensors of the same shape have equal values once converted to `dtype`."""
        pairs = zip(self.source.rows(self.name), other.source.rows(other.name), strict=True)
        return all(
            torch.equal(torch.from_numpy(mine).to(dtype), torch.from_numpy(theirs).to(dtype)) for mine, theirs in pairs
        )


@dataclass(frozen=True)
class Blocks:
    """The blocks of a matrix, in a format that kernels read."""

    name: str
    form: Format
    tensor: GgufTensor = field(repr=False)

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Read the blocks, in memory's order.

        Args:
            destination: uint8 [rows, bytes of a row], contiguous, on a CPU; overwritten.
            progress: called with the number of stored bytes after each slice.

        Raises:
            CheckpointError: as `rows`.
        """
        memory, start = destination.numpy(), 0
        for stored in self.rows():
            kept(stored, self.form, out=memory[start : start + len(stored)])
            start += len(stored)
            if progress is not None:
                progress(stored.nbytes)

    def rows(self) -> Iterator[np.ndarray]:
        """The blocks as they are in the file, some rows at a time: [rows, bytes] uint8.

        Raises:
            CheckpointError: a scale is not finite; the file cannot be read, or has changed since its header was read.
        """
        rows, width = self.tensor.shape
        row_bytes = width // self.form.stored_columns * self.form.stored_bytes
        step = max(1, SLICE_BYTES // row_bytes)
        with self.tensor.opened() as file:
            for start in range(0, rows, step):
                stored = np.empty((min(step, rows - start), row_bytes), np.uint8)
                fill(file, stored.reshape(-1).data, self.tensor.path)
                self._check_finite(stored)
                yield stored

    def _check_finite(self, stored: np.ndarray) -> None:
        numbers = stored.reshape(-1, self.form.stored_bytes).view("<u2")
        for at in self.form.halves_at:
            if (numbers[:, at // 2] & _EXPONENT == _EXPONENT).any():
                raise CheckpointError(f"tensor {self.name} holds a scale that is not finite: {self.tensor.path}")


class InPlaceCheckpoint:
    """The decoder's tensors of a GGUF file by Hugging Face's names.

    Args:
        file: the GGUF file.
        folder: its config, from `conversion.without_weights`.

    Raises:
        CheckpointError: a tensor is missing, surplus or misshapen; it is named.
    """

    def __init__(self, file: GgufFile, folder: Path) -> None:
        self.file, self.folder = file, file.path  # the folder is what errors name
        names = decoder_names(file, read_json(folder / "config.json"))
        self.tensors = {name: InPlaceTensor(stored, file) for name, stored in names.items()}

"""A matrix that a container stores as several tensors, read as one: as blocks, or as its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runtime.checkpoint.containers.scheme import GROUP, Parts, Scheme, Unpacked, refuse
from runtime.errors import CheckpointError
from runtime.kernels.cpu.block_formats import Format
from runtime.kernels.cpu.block_layout import kept

SLICE = 1 << 21  # weights that are rearranged at a time


@dataclass(frozen=True)
class PackedTensor:
    """A matrix.

    Args:
        name: as if it were stored as values ("….q_proj.weight").
        stored: its tensors, by the last part of their names.
        scheme: how they store it.
        in_blocks: whether it is to be read as blocks where kernels take its width.
    """

    name: str
    stored: Parts = field(repr=False)
    scheme: Scheme
    in_blocks: bool

    @property
    def file(self) -> Path:
        return next(iter(self.stored.values())).file

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(tensor.file for tensor in self.stored.values()))

    @property
    def dtype(self) -> str:
        """The dtype of its scales, in which other programs compute the model."""
        return self.stored[self.scheme.parts[-1]].dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.scheme.shape(self.stored[self.scheme.parts[0]].shape)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.stored.values())

    @property
    def blocks(self) -> PackedBlocks | None:
        """Its blocks, if it is to be read as such."""
        form = self.scheme.form(self.shape[1], self.dtype) if self.in_blocks else None
        return PackedBlocks(form, self) if form else None

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that its tensors are those of a matrix of this shape.

        Raises:
            CheckpointError: it is no matrix, its groups do not divide a row, or a tensor is missing, surplus,
                misshapen or of another dtype; it is named.
        """
        base = self.name.removesuffix("weight")
        if len(shape) != 2:
            raise CheckpointError(
                f"tensor {self.name} must be stored as values, got {sorted(self.stored)}: {self.file}"
            )
        rows, columns = shape
        if columns % (self.scheme.group or 1):
            raise CheckpointError(
                f"tensor {self.name} must have a multiple of {self.scheme.group} columns, its groups, got {columns}: "
                f"{self.file}"
            )
        layout = self.scheme.layout(rows, columns)
        if (whole := self.scheme.shape(layout[self.scheme.parts[0]][1])) != shape:
            raise CheckpointError(
                f"tensor {self.name} must fill whole words, {list(whole)}, got {list(shape)}: {self.file}"
            )
        if missing := [part for part in layout if part not in self.stored]:
            raise CheckpointError(f"tensor {base}{missing[0]} is missing: {self.file}")
        for part, tensor in self.stored.items():
            if part not in layout:
                raise refuse(tensor, "is not part of this model")
            dtypes, expected = layout[part]
            if tensor.shape != expected:
                raise refuse(tensor, f"must have shape {list(expected)}, got {list(tensor.shape)}")
            if tensor.dtype not in dtypes:
                raise refuse(tensor, f"is stored as {tensor.dtype}, expected {' or '.join(dtypes)}")

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """As `StoredTensor.copy_into`: its values, exact in fp32 and rounded once to another dtype.

        Raises:
            CheckpointError: as `unpacked`; a value overflows the destination's dtype.
        """
        start = 0
        for values in self.rows():
            target = destination[start : start + len(values)]
            target.copy_(values)
            if not all(math.isfinite(extreme) for extreme in torch.aminmax(target)):
                raise CheckpointError(f"tensor {self.name} overflows {target.dtype}: {self.file}")
            start += len(values)
            if progress is not None:
                progress(self.bytes * len(values) // len(destination))

    def rows(self) -> Iterator[torch.Tensor]:
        """Its values in fp32, some rows at a time.

        Raises:
            CheckpointError: as `unpacked`.
        """
        for q, zero, scale in self.slices():
            groups = q.view(len(q), scale.shape[1], -1)
            yield (scale.float()[..., None] * (groups.float() - zero.float()[..., None])).view(q.shape)

    def slices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """q [n, columns] uint8, zeros [n, groups] int16 and scales [n, groups] of some rows at a time.

        Raises:
            CheckpointError: as `unpacked`.
        """
        (rows, columns), found = self.shape, self.unpacked()
        step = max(1, SLICE // columns)
        for start in range(0, rows, step):
            some = slice(start, min(start + step, rows))
            yield found.q(some).contiguous(), found.zero[some], found.scale[some]

    def unpacked(self) -> Unpacked:
        """Read its tensors.

        Raises:
            CheckpointError: a scale is not finite, or too large for values in fp32; else as `Scheme.unpacked`.
        """
        found, scales = self.scheme.unpacked(self.stored), self.stored[self.scheme.parts[-1]]
        largest = max(abs(extreme.item()) for extreme in torch.aminmax(found.scale.float()))
        if not math.isfinite(largest):
            raise refuse(scales, "holds a scale that is not finite")
        if largest * 2**self.scheme.bits > torch.finfo(torch.float32).max:
            raise refuse(scales, f"holds a scale that is too large, {largest:g}")
        return found

    def equals(self, other: object, dtype: torch.dtype) -> bool:
        """Whether another matrix of the same shape is stored alike."""
        if not isinstance(other, PackedTensor) or self.stored.keys() != other.stored.keys():
            return False
        return all(torch.equal(tensor.read(), other.stored[part].read()) for part, tensor in self.stored.items())


@dataclass(frozen=True)
class PackedBlocks:
    """A matrix in blocks."""

    form: Format
    tensor: PackedTensor = field(repr=False)

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """As `StoredTensor.copy_into`, for uint8 [rows, bytes of a row] on a CPU, as they are kept in memory."""
        memory, start = destination.numpy(), 0
        for q, zero, scale in self.tensor.slices():
            blocks = blocks_of(q, zero, scale, self.form)
            kept(blocks.numpy(), self.form, out=memory[start : start + len(q)])
            start += len(q)
            if progress is not None:
                progress(self.tensor.bytes * len(q) // len(destination))


def blocks_of(q: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, form: Format) -> torch.Tensor:
    """The blocks of scale * (q - zero), [n, bytes of a row] uint8, as a file has them.

    Args:
        q, zero, scale: as `PackedTensor.slices` gives them; q - zero fits the format, and scales are of its type.
        form: the format.
    """
    rows, columns = q.shape
    steps = q.view(rows, zero.shape[1], -1) - zero[..., None]  # int16
    if form.is_row:
        scales = scale.float().flatten().view(torch.uint8).view(rows, 4)
        return torch.cat((scales, steps.view(rows, columns).to(torch.int8).view(torch.uint8)), 1)
    blocks = columns // GROUP
    scales = scale.repeat_interleave(blocks // scale.shape[1], 1).flatten().view(torch.uint8).view(rows, blocks, 2)
    steps = steps.view(rows, blocks, GROUP)
    if form.layout == "Q8_0":
        return torch.cat((scales, steps.to(torch.int8).view(torch.uint8)), 2).view(rows, -1)
    codes = (steps + (8 if form.layout == "Q4_0" else 16)).to(torch.uint8)
    low, high = codes[..., : GROUP // 2] & 15, codes[..., GROUP // 2 :] & 15
    nibbles = low | high << 4
    if form.layout == "Q4_0":
        return torch.cat((scales, nibbles), 2).view(rows, -1)
    bits = (codes >> 4).view(rows, blocks, 4, 8) << torch.arange(8, dtype=torch.uint8, device="cpu")
    return torch.cat((scales, bits.sum(3, dtype=torch.uint8), nibbles), 2).view(rows, -1)

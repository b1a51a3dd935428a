"""Weight matrices kept in blocks of integers with scales (cpu/block_formats.py)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from runtime.kernels.cpu.availability import unusable_numba
from runtime.kernels.cpu.block_formats import BFLOATS, Part
from runtime.kernels.cpu.block_values import dequantized
from runtime.kernels.scaled_matrix import ScaledMatrix


class QuantizedMatrix:
    """A weight matrix [outputs, columns] in one format or, where matrices of different formats are packed, in several.

    Args:
        parts: its rows, in order; contiguous, on one CPU.

    Raises:
        ValueError: parts of different widths.
    """

    dtype = torch.float32  # of its values

    def __init__(self, parts: Sequence[Part]) -> None:
        widths = {part.data.shape[1] // part.format.bytes * part.format.columns for part in parts}
        if len(widths) != 1:
            raise ValueError(f"parts: expected one width, got {sorted(widths)} columns")
        self.parts = tuple(parts)
        self._columns = widths.pop()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(len(part.data) for part in self.parts), self._columns))

    @property
    def device(self) -> torch.device:
        return self.parts[0].data.device

    @property
    def nbytes(self) -> int:
        return sum(part.data.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"QuantizedMatrix({list(self.shape)}, {self.formats})"

    @property
    def formats(self) -> str:
        """The names of its formats: "Q5_0 + Q8_0"."""
        return " + ".join(dict.fromkeys(part.format.name for part in self.parts))

    def numel(self) -> int:
        """How many weights it has."""
        return self.shape.numel()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The values of some rows: for ids [...] int64, [..., columns] fp32."""
        out = torch.empty(ids.numel(), self._columns, dtype=torch.float32, device=ids.device)
        flat, first = ids.reshape(-1), 0
        for part in self.parts:
            within = (flat >= first) & (flat < first + len(part.data))
            if within.any():
                out[within] = torch.from_numpy(dequantized(part.data[flat[within] - first].numpy(), part.format))
            first += len(part.data)
        return out.view(*ids.shape, self._columns)

    def dequantized(self) -> torch.Tensor:
        """All of its values, [outputs, columns] fp32."""
        out, first = torch.empty(self.shape, dtype=torch.float32, device=self.parts[0].data.device), 0
        for part in self.parts:
            _dequantize(out[first : first + len(part.data)], part)
            first += len(part.data)
        return out

    def split(self, sizes: int | Sequence[int]) -> list[QuantizedMatrix]:
        """Its rows as matrices of these sizes, or all of one size with the rest in a last one; views of it."""
        if isinstance(sizes, int):
            sizes = [min(sizes, len(self) - first) for first in range(0, len(self), sizes)]
        found, first = [], 0
        for size in sizes:
            found.append(self._between(first, first + size))
            first += size
        return found

    def _between(self, first: int, end: int) -> QuantizedMatrix:
        parts, start = [], 0
        for part in self.parts:
            rows = part.data[max(first - start, 0) : max(end - start, 0)]
            if len(rows):
                parts.append(Part(part.format, rows))
            start += len(part.data)
        return QuantizedMatrix(parts)


Matrix = torch.Tensor | QuantizedMatrix | ScaledMatrix  # a weight matrix [outputs, columns]


def packed(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """The rows of several matrices after one another, in one part where neighbours have one format."""
    parts: list[Part] = []
    for part in (part for matrix in matrices for part in matrix.parts):
        if parts and parts[-1].format == part.format:
            parts[-1] = Part(part.format, torch.cat((parts[-1].data, part.data)))
        else:
            parts.append(part)
    return QuantizedMatrix(parts)


def _dequantize(out: torch.Tensor, part: Part) -> None:
    if part.format == BFLOATS:
        out.copy_(part.data.view(torch.bfloat16))
    elif unusable_numba():
        out.numpy()[:] = dequantized(part.data.numpy(), part.format)
    else:
        blocks, records = (importlib.import_module(f"runtime.kernels.cpu.{name}") for name in ("blocks", "records"))
        blocks.dequantize(out.numpy(), records.records(part))

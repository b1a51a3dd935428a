"""How a container stores a matrix: in which tensors, as which integers, and what values those stand for.

    w = scale * (q - zero)

q is unsigned; a scale and a zero hold for a group of columns, or for a whole row. In fp32 the product is exact where
scales are fp16 or bf16, and rounded once where they are fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from runtime.checkpoint.stored_tensor import StoredTensor
from runtime.errors import CheckpointError
from runtime.kernels.cpu.block_formats import BFLOAT_FORMATS, COLUMNS, FORMATS, Format, int8_rows

Layout = Mapping[
    str, tuple[tuple[str, ...], tuple[int, ...]]
]  # the dtypes that a tensor may have and its shape, by part
Parts = Mapping[str, StoredTensor]  # the tensors of a matrix, by the last part of their names
GROUP = 32  # columns that share a scale in blocks: groups are a multiple of them


@dataclass(frozen=True, repr=False)
class Unpacked:
    """A matrix [rows, columns].

    Args:
        scale: [rows, groups], of its stored dtype.
        zero: [rows, groups] int16.
        q: gives the integers of some rows, [n, columns] uint8.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    q: Callable[[slice], torch.Tensor]


@dataclass(frozen=True)
class Scheme(ABC):
    """What a container's config says about its matrices.

    Args:
        bits: of q, 4 or 8.
        group: columns that share a scale, a multiple of GROUP; None for all of a row.
        is_symmetric: whether every zero is 2^(bits - 1).
    """

    bits: int
    group: int | None
    is_symmetric: bool

    container: ClassVar[str]  # "gptq"

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Every name that a tensor of a matrix may have, after its last dot: the integers first, scales last."""

    @abstractmethod
    def layout(self, rows: int, columns: int) -> Layout:
        """The dtypes and the shape of every part that a matrix must have."""

    @abstractmethod
    def shape(self, integers: tuple[int, ...]) -> tuple[int, int]:
        """The rows and columns of a matrix whose integers are a tensor of this shape."""

    @abstractmethod
    def unpacked(self, parts: Parts) -> Unpacked:
        """Read a matrix.

        Args:
            parts: as `layout` has them.

        Raises:
            CheckpointError: a tensor holds what this scheme cannot; it is named. Or a file cannot be read.
        """

    def groups(self, columns: int) -> int:
        """How many groups a row has."""
        return 1 if self.group is None else columns // self.group

    def words(self, count: int) -> int:
        """How many int32 hold so many integers."""
        return -(-count * self.bits // 32)

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """The dtypes of scales that blocks can hold."""
        return ("BF16", "F16", "F32") if self.bits == 8 and self.group is None else ("BF16", "F16")

    def form(self, columns: int, scale_dtype: str) -> Format | None:
        """The format of the blocks that hold the values of rows of so many columns exactly; None where kernels do not
        take that width.

        A zero other than 2^(bits - 1) is subtracted from the integers, which then have five bits: 16 + q - zero.
        """
        if columns % COLUMNS:
            return None
        if self.bits == 8 and self.group is None:
            return int8_rows(columns)
        name = "Q8_0" if self.bits == 8 else "Q4_0" if self.is_symmetric else "Q5_0"
        return FORMATS[name] if scale_dtype == "F16" else BFLOAT_FORMATS[f"{name}_BF16"]

    def symmetric_zeros(self, rows: int, columns: int) -> torch.Tensor:
        return torch.full((rows, self.groups(columns)), 1 << self.bits - 1, dtype=torch.int16, device="cpu")

    def integers(self, packed: torch.Tensor) -> torch.Tensor:
        """The integers packed in [n, words] int32, the first in the lowest bits: [n, words * 32 / bits] uint8."""
        found = packed.contiguous().view(torch.uint8)
        return found if self.bits == 8 else torch.stack((found & 15, found >> 4), -1).view(len(found), -1)


def refuse(tensor: StoredTensor, what: str) -> CheckpointError:
    """The error for a tensor that does not hold what it must."""
    return CheckpointError(f"tensor {tensor.name} {what}: {tensor.file}")

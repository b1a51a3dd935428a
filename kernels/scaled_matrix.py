"""Weight matrices of integers with scales, as Triton's kernels read them.

    int8    w = scale * q       q in 8 bits, one fp32 scale for each output
    int4    w = d * (q - 8)     q in 4 bits, one fp16 d for each group of 32 columns: the values of GGUF's Q4_0

The four groups of 128 columns lie across 32 words of 16 bits: column 32 g + j is in bits 4 g to 4 g + 3 of word j. So
two neighbouring words in a register give a pair of neighbouring weights of any group with one shift and one mask
(integers.py), and the four groups' scales are one number of 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP = 32  # columns that share a scale of int4
GROUPS = 4  # each word has a column of each
COLUMNS = GROUP * GROUPS  # int4 has a multiple of these
_SCALES = {torch.int8: torch.float32, torch.int16: torch.int64}  # their dtype, by that of the integers


@dataclass(frozen=True, eq=False, repr=False)
class ScaledMatrix:
    """A weight matrix [outputs, columns].

    Args:
        q: [outputs, columns] int8, or [outputs, columns / 4] int16, words of int4.
        scale: on the same device: [outputs] fp32, or for int4 [outputs, columns / 128] int64, four fp16 in each.

    Raises:
        TypeError, ValueError: dtype, shape or device is not as documented.
    """

    q: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        if _SCALES.get(self.q.dtype) is not self.scale.dtype:
            raise TypeError(
                f"q, scale: expected int8 and fp32, or int16 and int64, got {self.q.dtype} and {self.scale.dtype}"
            )
        outputs, *columns = self.q.shape
        expected = (outputs,) if self.q.dtype is torch.int8 else (outputs, *(count / GROUP for count in columns))
        if self.q.dim() != 2 or self.scale.shape != expected or self.scale.device != self.q.device:
            raise ValueError(
                f"scale: expected those of q {list(self.q.shape)} {self.q.dtype} on {self.q.device}, got "
                f"{list(self.scale.shape)} on {self.scale.device}"
            )

    @classmethod
    def of_groups(cls, q: torch.Tensor, d: torch.Tensor) -> ScaledMatrix:
        """Packs a matrix of int4.

        Args:
            q: [outputs, columns], integers of 0 to 15; columns are a multiple of 128.
            d: [outputs, columns / 32] fp16.

        Raises:
            ValueError: columns are not a multiple of 128.
        """
        outputs, columns = q.shape
        if columns % COLUMNS:
            raise ValueError(f"q: expected a multiple of {COLUMNS} columns, got {columns}")
        words = sum(
            of_group.to(torch.int32) << 4 * group
            for group, of_group in enumerate(q.view(outputs, -1, GROUPS, GROUP).unbind(2))
        )
        assert isinstance(words, torch.Tensor)
        return cls(words.to(torch.int16).view(outputs, -1), d.contiguous().view(torch.int64))

    def groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The q (uint8) and d of a matrix of int4: the inverse of `of_groups`."""
        words = self.q.view(len(self), -1, 1, GROUP).to(torch.int32)
        shifts = torch.arange(0, 4 * GROUPS, 4, dtype=torch.int32, device=self.device)[:, None]
        return (words >> shifts & 15).to(torch.uint8).view(self.shape), self.scale.view(torch.float16)

    @property
    def format(self) -> str:
        """ "int8" or "int4"."""
        return "int8" if self.q.dtype is torch.int8 else "int4"

    @property
    def shape(self) -> torch.Size:
        return self.q.shape if self.format == "int8" else torch.Size((len(self.q), GROUPS * self.q.shape[1]))

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes

    def __len__(self) -> int:
        return len(self.q)

    def __repr__(self) -> str:
        return f"ScaledMatrix({list(self.shape)}, {self.format})"

    def numel(self) -> int:
        """How many weights it has."""
        return self.shape.numel()

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values of some rows: for ids [...] int64, [..., columns], as `dequantized`."""
        flat = ids.reshape(-1)
        return ScaledMatrix(self.q[flat], self.scale[flat]).dequantized(dtype).view(*ids.shape, -1)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """All of its values, [outputs, columns] in fp32 or fp64; those of int4 are exact, those of int8 in fp32 are
        rounded once."""
        if self.format == "int8":
            return self.q.to(dtype) * self.scale.to(dtype)[:, None]
        q, d = self.groups()
        return ((q.to(dtype) - 8).view(len(self), -1, GROUP) * d.to(dtype)[..., None]).view(self.shape)

    def split(self, sizes: int | Sequence[int]) -> list[ScaledMatrix]:
        """Its rows as matrices of these sizes, or all of one size with the rest in a last one; views of it."""
        if not isinstance(sizes, int):
            sizes = list(sizes)
        return [ScaledMatrix(*both) for both in zip(self.q.split(sizes), self.scale.split(sizes), strict=True)]


def empty_matrix(outputs: int, columns: int, format: str, device: torch.device) -> ScaledMatrix:
    """An uninitialised matrix of "int8" or "int4".

    Raises:
        ValueError: another format, or int4 with columns that are not a multiple of 128.
    """
    if format not in ("int8", "int4") or (format == "int4" and columns % COLUMNS):
        raise ValueError(f"expected int8, or int4 with a multiple of {COLUMNS} columns, got {format} with {columns}")
    if format == "int8":
        q = torch.empty(outputs, columns, dtype=torch.int8, device=device)
        return ScaledMatrix(q, torch.empty(outputs, dtype=torch.float32, device=device))
    q = torch.empty(outputs, columns // GROUPS, dtype=torch.int16, device=device)
    return ScaledMatrix(q, torch.empty(outputs, columns // COLUMNS, dtype=torch.int64, device=device))

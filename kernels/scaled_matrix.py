"""Weight matrices of integers with scales, as Triton's kernels read them.

int8    w = scale * q       q in 8 bits; one fp32 scale for each output
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False, repr=False)
class ScaledMatrix:
    """A weight matrix [outputs, columns], rows of which are views of it.

    Args:
        q: [outputs, columns] int8.
        scale: [outputs] fp32, on the same device.

    Raises:
        TypeError, ValueError: dtype, shape or device is not as documented.
    """

    q: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        if self.q.dtype is not torch.int8 or self.scale.dtype is not torch.float32:
            raise TypeError(f"q, scale: expected int8 and fp32, got {self.q.dtype} and {self.scale.dtype}")
        if self.q.dim() != 2 or self.scale.shape != self.q.shape[:1] or self.scale.device != self.q.device:
            raise ValueError(
                f"scale: expected one for each output of q {list(self.q.shape)} on {self.q.device}, got "
                f"{list(self.scale.shape)} on {self.scale.device}"
            )

    @property
    def format(self) -> str:
        """Its name in block tables."""
        return "int8"

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

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
        """The values of some rows: for ids [...] int64, [..., columns] in fp32 or fp64, products rounded once."""
        return (
            ScaledMatrix(self.q[ids.reshape(-1)], self.scale[ids.reshape(-1)]).dequantized(dtype).view(*ids.shape, -1)
        )

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """All of its values, [outputs, columns] in fp32 or fp64, products rounded once."""
        return self.q.to(dtype) * self.scale.to(dtype)[:, None]

    def split(self, sizes: int | Sequence[int]) -> list[ScaledMatrix]:
        """Its rows in matrices of these sizes, or of this size and a last one of the rest; views of it."""
        if not isinstance(sizes, int):
            sizes = list(sizes)
        return [ScaledMatrix(*both) for both in zip(self.q.split(sizes), self.scale.split(sizes), strict=True)]


def empty_matrix(outputs: int, columns: int, format: str, device: torch.device) -> ScaledMatrix:
    """A matrix that has no values yet."""
    if format != "int8":
        raise ValueError(f'format: expected "int8", got {format!r}')
    q = torch.empty(outputs, columns, dtype=torch.int8, device=device)
    return ScaledMatrix(q, torch.empty(outputs, dtype=torch.float32, device=device))

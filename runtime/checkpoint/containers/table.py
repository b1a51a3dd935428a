"""An embedding or a head that a container leaves in bf16: it stays in bf16, while activations are in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from runtime.checkpoint.stored_tensor import StoredTensor
from runtime.kernels.cpu.block_formats import BF16, BFLOATS, Format


@dataclass(frozen=True)
class BfloatTable:
    """A table's values as they are stored."""

    tensor: StoredTensor = field(repr=False)

    form: ClassVar[Format] = BFLOATS

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """As `StoredTensor.copy_into`, for uint8 [rows, bytes of a row]."""
        self.tensor.copy_into(destination.view(torch.bfloat16), progress)


@dataclass(frozen=True)
class TableTensor(StoredTensor):
    """An embedding or a head."""

    @property
    def blocks(self) -> BfloatTable | None:  # type: ignore[override]
        return BfloatTable(self) if self.dtype == BF16 else None

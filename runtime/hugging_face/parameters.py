"""A transformers model in memory, in the form that `checkpoint.weights` reads: parameters in place of a file's
tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.errors import CheckpointError, InvalidArgument
from runtime.model.config import DTYPES


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model, and its name there. Reading it moves it: its own memory is released once it is copied,
    and it becomes a view of the copy."""

    name: str
    value: torch.nn.Parameter

    blocks = None

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that it can be a weight of this shape.

        Raises:
            CheckpointError: it has another shape.
        """
        if tuple(self.value.shape) != shape:
            raise CheckpointError(f"parameter {self.name} must have shape {list(shape)}, got {list(self.value.shape)}")

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Move the parameter to other memory.

        Args:
            destination: same shape, dtype and device, contiguous; overwritten.
            progress: called with the number of bytes.

        Raises:
            CheckpointError: a value is not finite; the parameter is as it was.
        """
        destination.copy_(self.value.detach())
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(destination)):
            raise CheckpointError(f"parameter {self.name} holds a value that is not finite")
        self.value.data = destination
        if progress is not None:
            progress(destination.nbytes)

    def equals(self, other: Parameter, dtype: torch.dtype) -> bool:
        """Whether two parameters of the same shape have equal values."""
        return self.value is other.value or torch.equal(self.value, other.value)


class Parameters:
    """All parameters of a model, which have one dtype and one device.

    Raises:
        InvalidArgument: they have several, or a dtype that this runtime does not compute in.
    """

    def __init__(self, hf_model: Any) -> None:
        self.folder = Path(type(hf_model).__name__)  # what errors name
        self.tensors = {
            name: Parameter(name, value) for name, value in hf_model.named_parameters(remove_duplicate=False)
        }
        self.dtype = self._only("dtype", "torch.")
        self.device = self._only("device")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"the model's dtype must be one of {DTYPES}, got {self.dtype}")

    def _only(self, what: str, prefix: str = "") -> str:
        found = sorted({str(getattr(tensor.value, what)).removeprefix(prefix) for tensor in self.tensors.values()})
        if len(found) != 1:
            raise InvalidArgument(f"all parameters of the model must have one {what}, got {', '.join(found) or 'none'}")
        return found[0]

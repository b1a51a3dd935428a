"""An operation of a step or a chunk: its arguments, declared once, and the forms in which it can run.

Each operation's file has a dataclass of its arguments: outputs first, then inputs, sizes, scalars and flags. A backend
(ops.py) makes one, checks it and runs its own form of it. Kernels take their arguments from it by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch

from runtime.kernels.launch import Launcher


class NumbaCall(Protocol):
    """Captures the compiled CPU kernel of an operation (cpu/calls.py)."""

    def __call__(self, operation: Operation, **extra: Any) -> None:
        """Captures the kernel of the operation's name, its parameters taken from `extra`, else from its fields."""

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer that a kernel uses while it runs, shared by all calls that ask for the same."""


class Operation(ABC):
    """One operation with its arguments; nothing happens until a backend runs it."""

    name: ClassVar[str]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.device})"

    @property
    def device(self) -> torch.device:
        """Where its tensors are: that of the first field, an output."""
        return next(iter(vars(self).values())).device

    @abstractmethod
    def check(self) -> None:
        """Checks the arguments; nothing is launched or written.

        Raises:
            TypeError, ValueError: dtype, shape, device or stride of an argument is not as documented.
        """

    @abstractmethod
    def run_torch(self) -> None:
        """Plain PyTorch, with Hugging Face's operations in its order."""

    @abstractmethod
    def run_triton(self, launch: Launcher) -> None:
        """Its Triton kernels."""

    def run_numba(self, call: NumbaCall) -> None:
        """Its compiled CPU kernel."""
        call(self)

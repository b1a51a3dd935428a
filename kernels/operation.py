"""What an operation of a decode step is: its arguments, written once, and the forms that it can be run in.

Each operation's file has a dataclass of its arguments: outputs first, then inputs, sizes, scalars and flags. A backend
(ops.py) makes one, checks it and runs the form that it stands for. Kernels find their arguments in it by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch

from runtime.kernels.launch import Launcher


class NumbaCall(Protocol):
    """What runs, or captures, the compiled CPU kernel of an operation (cpu_calls.py)."""

    def __call__(self, operation: Operation, **given: Any) -> None:
        """Fills the parameters of the kernel that has the operation's name: from `given`, else from its fields."""

    def scratch(self, *shape: int) -> torch.Tensor:
        """An fp32 buffer for what a kernel keeps until it has finished, shared by the calls of a step."""


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
        """Checks the arguments. Nothing is launched or written before.

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

"""Capturing on a CPU: the compiled kernels of a step are recorded, then replayed at little cost."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from runtime.kernels.cpu.availability import unusable_numba
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.operation import Operation
from runtime.kernels.ops import Ops
from runtime.kernels.quantized import QuantizedMatrix
from runtime.kernels.scaled_matrix import ScaledMatrix

DTYPES = (torch.float32, torch.bfloat16)
Scratch = dict[tuple[torch.dtype | int, ...], torch.Tensor]  # by dtype and shape


class Calls(list[tuple[Any, tuple[Any, ...]]]):
    """Captured calls: compiled kernels and their arguments after `team` and `thread`."""

    def __init__(self, calls: Iterable[tuple[Any, tuple[Any, ...]]] = ()) -> None:
        super().__init__(calls)
        self._program: Any = None
        self._one_by_one: list[tuple[str, Calls]] = []

    def one_by_one(self) -> list[tuple[str, Calls]]:
        """Each call alone, with its kernel's name."""
        if not self._one_by_one:
            self._one_by_one = [(kernel.py_func.__name__, Calls([(kernel, arguments)])) for kernel, arguments in self]
        return self._one_by_one

    def compile(self) -> Any:
        """All calls as one runtime.kernels.cpu.team.Program, compiled once."""
        if self._program is None:
            self._program = importlib.import_module("runtime.kernels.cpu.team").Program(self)
        return self._program


def missing(dtype: torch.dtype) -> str | None:
    """Why there are no compiled kernels for a dtype here; None where there are."""
    if INTERPRETING:
        return "Triton's kernels are being interpreted"
    if dtype not in DTYPES:
        return f"there are none for {dtype}"
    return unusable_numba()


def multiply_many_rows() -> bool:
    """Whether compiled kernels multiply a matrix in blocks by many rows in no more time than a library's fp32 products
    of its values take. That needs instructions that multiply bytes (digits.py); without, they take twice as long (Zen
    3, 512 rows)."""
    if missing(torch.float32):
        return False
    multiplies_bytes: bool = importlib.import_module("runtime.kernels.cpu.digits").multiplies_bytes()
    return multiplies_bytes


class NumbaOps(Ops):
    """Captures the compiled kernels of operations on a CPU; nothing runs.

    Args:
        scratch: buffers that kernels use while they run, added to. Captures that never run at the same time may share
            them.
    """

    def __init__(self, scratch: Scratch | None = None) -> None:
        self.calls = Calls()
        self._scratch = {} if scratch is None else scratch

    def run(self, operation: Operation) -> None:
        operation.run_numba(self)

    def __call__(self, operation: Operation, **extra: Any) -> None:
        """Captures a call of the operation's kernel in runtime.kernels.cpu, with parameters from `extra`, else from the
        operation's fields.

        Tensors, on a CPU and contiguous as operations check, are passed as arrays over their memory, floats in fp32.
        """
        kernel = getattr(importlib.import_module("runtime.kernels.cpu.operations"), operation.name, None)
        if kernel is None:
            raise NotImplementedError(f"{operation.name} has no compiled CPU kernel")
        names = kernel.py_func.__code__.co_varnames[2 : kernel.py_func.__code__.co_argcount]  # after team and thread
        values = (extra[name] if name in extra else getattr(operation, name) for name in names)
        self.calls.append((kernel, tuple(map(_argument, values))))

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer that a kernel uses while it runs, shared by all calls that ask for the same."""
        key: tuple[torch.dtype | int, ...] = (dtype, *shape)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(shape, dtype=dtype, device="cpu")
        return self._scratch[key]


def captured(step: Callable[[Ops], object], scratch: Scratch | None = None) -> Calls:
    """The compiled kernels of the operations that `step` calls on the backend that it is given; nothing runs."""
    ops = NumbaOps(scratch)
    step(ops)
    return ops.calls


def run(calls: Calls, threads: int | None = None, rows: int | None = None) -> None:
    """Runs captured calls in order.

    Args:
        calls: what runs.
        threads: how many run it; None for as many as PyTorch would use.
        rows: how many of the last rows of their arrays the projections, the attention of a sequence and the head
            compute; None for all. Another number needs no compilation.
    """
    program = calls.compile()
    threads = torch.get_num_threads() if threads is None else threads
    program.run(threads) if rows is None else program.run(threads, rows)


def _argument(value: Any) -> Any:
    if isinstance(value, QuantizedMatrix):
        from runtime.kernels.cpu.records import records

        (part,) = value.parts
        return records(part)
    if isinstance(value, ScaledMatrix):
        raise TypeError(f"expected a matrix of values or of blocks on a CPU, got {value}")
    if isinstance(value, torch.Tensor):
        return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, float):
        import numpy as np

        return np.float32(value)
    return value

"""Capturing on a CPU: the compiled kernels of a step, kept as calls that can be repeated at little cost."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from runtime.kernels.launch import INTERPRETING
from runtime.kernels.operation import Operation
from runtime.kernels.ops import Ops

DTYPES = (torch.float32, torch.bfloat16)


class Calls(list[tuple[Any, tuple[Any, ...]]]):
    """Compiled functions and what they take after the team and the thread: captured, then compiled into one piece when
    they are first run."""

    def __init__(self, calls: Iterable[tuple[Any, tuple[Any, ...]]] = ()) -> None:
        super().__init__(calls)
        self._program: Any = None

    def compile(self) -> Any:
        """The one piece, a runtime.kernels.cpu_team.Program; made once."""
        if self._program is None:
            self._program = importlib.import_module("runtime.kernels.cpu_team").Program(self)
        return self._program


def missing(dtype: torch.dtype) -> str | None:
    """Why there are no compiled kernels for a dtype here; None where there are."""
    if INTERPRETING:
        return "Triton's kernels are being interpreted"
    if dtype not in DTYPES:
        return f"there are none for {dtype}"
    return _unusable_numba()


@functools.cache
def _unusable_numba() -> str | None:
    try:
        numba = importlib.import_module("numba")
        if numba.config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
        importlib.import_module("runtime.kernels.cpu_team")
    except ImportError as error:
        return f"numba is needed: {' '.join(str(error).split())}"
    return None


class NumbaOps(Ops):
    """Captures the compiled kernels of operations on a CPU; nothing runs."""

    def __init__(self) -> None:
        self.calls = Calls()
        self._scratch: dict[tuple[int, ...], torch.Tensor] = {}

    def run(self, operation: Operation) -> None:
        operation.run_numba(self)

    def __call__(self, operation: Operation, **given: Any) -> None:
        """Captures a call of the kernel of an operation's name in runtime.kernels.cpu, whose parameters come from
        `given`, else from the operation's fields.

        Tensors, on a CPU and contiguous as operations check, are given to it as arrays over their memory, floats in
        fp32.
        """
        kernel = getattr(importlib.import_module("runtime.kernels.cpu"), operation.name)
        names = kernel.py_func.__code__.co_varnames[2 : kernel.py_func.__code__.co_argcount]  # after team and thread
        given = {name: getattr(operation, name) for name in names if name not in given} | given
        self.calls.append((kernel, tuple(_argument(given[name]) for name in names)))

    def scratch(self, *shape: int) -> torch.Tensor:
        """An fp32 buffer for what a call keeps until it has finished, shared by the calls of a capture."""
        return self._scratch.setdefault(shape, torch.empty(shape))


def captured(step: Callable[[Ops], object]) -> Calls:
    """The compiled kernels of the operations that `step` calls on the backend that it is given; nothing runs."""
    ops = NumbaOps()
    step(ops)
    return ops.calls


def run(calls: Calls, threads: int | None = None) -> None:
    """Runs captured calls in order, on so many threads; None means as many as PyTorch would use."""
    calls.compile().run(torch.get_num_threads() if threads is None else threads)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, float):
        import numpy as np

        return np.float32(value)
    return value

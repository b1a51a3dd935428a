"""Capturing on a CPU: launchers record calls of the compiled kernels, which are then repeated at little cost. Outside a
capture they run their references."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from contextvars import ContextVar, copy_context
from typing import Any

import torch

from runtime.kernels.launch import INTERPRETING

DTYPES = (torch.float32, torch.bfloat16)


class Calls(list[tuple[Any, tuple[Any, ...]]]):
    """Captured calls: compiled kernels and their arguments after `team` and `thread`."""

    def __init__(self, calls: Iterable[tuple[Any, tuple[Any, ...]]] = ()) -> None:
        super().__init__(calls)
        self.scratch: dict[tuple[int, ...], torch.Tensor] = {}
        self._program: Any = None

    def compile(self) -> Any:
        """All calls as one runtime.kernels.cpu.team.Program, compiled once."""
        if self._program is None:
            self._program = importlib.import_module("runtime.kernels.cpu.team").Program(self)
        return self._program


_capture: ContextVar[Calls | None] = ContextVar("capture", default=None)


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
        importlib.import_module("runtime.kernels.cpu.team")
    except ImportError as error:
        return f"numba is needed: {' '.join(str(error).split())}"
    return None


def captured(step: Callable[[], object]) -> Calls:
    """The calls that launchers make with tensors on a CPU during `step`; none of them runs."""
    calls = Calls()

    def collected() -> None:
        _capture.set(calls)
        step()

    # In a context of its own: no interrupt leaves a capture open, as it could where Python code has to close it.
    copy_context().run(collected)
    return calls


def capture(kernel: str, *arguments: Any) -> bool:
    """Records a call of runtime.kernels.cpu.operations' `kernel` if a capture is open; returns whether one is.

    Tensors, on a CPU and contiguous as launchers check, become arrays over their memory, floats fp32.
    """
    calls = _capture.get()
    if calls is None:
        return False
    compiled = getattr(importlib.import_module("runtime.kernels.cpu.operations"), kernel)
    calls.append((compiled, tuple(_argument(argument) for argument in arguments)))
    return True


def scratch(*shape: int) -> torch.Tensor | None:
    """An fp32 buffer for intermediate results, shared by all calls of the open capture."""
    calls = _capture.get()
    return None if calls is None else calls.scratch.setdefault(shape, torch.empty(shape))


def run(calls: Calls, threads: int | None = None) -> None:
    """Runs captured calls in order on a number of threads; None means as many as PyTorch would use."""
    calls.compile().run(torch.get_num_threads() if threads is None else threads)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, float):
        import numpy as np

        return np.float32(value)
    return value

"""Capturing on a CPU: the compiled kernels that launchers would run, kept as calls that can be repeated at little cost.

Outside a capture launchers on a CPU run their references.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from runtime.kernels.launch import INTERPRETING

DTYPES = (torch.float32, torch.bfloat16)

Calls = list[tuple[Any, tuple[Any, ...]]]  # compiled functions and what they take after the number of threads

_capture: ContextVar[Calls | None] = ContextVar("capture", default=None)
# The number of threads that the last run of a Python thread was asked for and what it took: numba keeps one a thread.
_last = threading.local()


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
        importlib.import_module("numba.np.ufunc.omppool")  # numba's other threads are slow to start, or stop a process
        importlib.import_module("runtime.kernels.cpu")
    except ImportError as error:
        return f"numba with OpenMP is needed: {error}"
    return None


@contextmanager
def captured() -> Iterator[Calls]:
    """Collects what launchers are asked for with tensors on a CPU; nothing runs."""
    calls: Calls = []
    token = _capture.set(calls)
    try:
        yield calls
    finally:
        _capture.reset(token)


def capture(kernel: str, *arguments: Any) -> bool:
    """Keeps a call of runtime.kernels.cpu's `kernel` if a capture is open, and says whether one is.

    Tensors, on a CPU and contiguous as launchers check, are given to it as arrays over their memory, floats in fp32.
    """
    calls = _capture.get()
    if calls is None:
        return False
    compiled = getattr(importlib.import_module("runtime.kernels.cpu"), kernel)
    calls.append((compiled, tuple(_argument(argument) for argument in arguments)))
    return True


def run(calls: Calls) -> None:
    """Runs captured calls in order, on as many threads as PyTorch would use."""
    asked = torch.get_num_threads()
    new = asked != getattr(_last, "asked", None)
    if new:
        import numba

        # The latter is what the process's affinity allows.
        _last.asked, _last.threads = asked, min(asked, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        numba.set_num_threads(_last.threads)
    threads = _last.threads
    for kernel, arguments in calls:
        kernel(threads, *arguments)
    if new:  # numba's OpenMP, when it starts, sets the count that PyTorch goes by
        torch.set_num_threads(asked)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, float):
        import numpy as np

        return np.float32(value)
    return value

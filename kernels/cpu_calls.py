"""Capturing on a CPU: the compiled kernels that launchers would run, kept as calls that can be repeated at little cost.

Outside a capture launchers on a CPU run their references.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from types import SimpleNamespace
from typing import Any

import torch

from runtime.kernels.launch import INTERPRETING

DTYPES = (torch.float32, torch.bfloat16)

Calls = list[tuple[Any, tuple[Any, ...]]]  # compiled functions and what they take after the number of threads

_capture: ContextVar[Calls | None] = ContextVar("capture", default=None)
# The number of threads that the last run of a Python thread was asked for and what it took: numba keeps one a thread.
_last = threading.local()
_process = SimpleNamespace(forked=False)


def missing(dtype: torch.dtype) -> str | None:
    """Why there are no compiled kernels for a dtype here; None where there are."""
    if INTERPRETING:
        return "Triton's kernels are being interpreted"
    if dtype not in DTYPES:
        return f"there are none for {dtype}"
    return _unusable_numba()


@functools.cache
def _unusable_numba() -> str | None:
    asked = torch.get_num_threads()
    try:
        importlib.import_module("numba.np.ufunc.omppool")
        numba = importlib.import_module("numba")
        if numba.config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
        numba.get_num_threads()  # chooses the kind of threads
        if numba.threading_layer() == "workqueue":
            return "numba was told to use its own threads (workqueue), which stop a process where two requests meet"
        importlib.import_module("runtime.kernels.cpu")
    except (ImportError, ValueError) as error:  # the latter from numba, about its threads
        return f"numba with OpenMP is needed: {' '.join(str(error).split())}"
    finally:  # numba's OpenMP, when it starts, sets the count that PyTorch goes by
        torch.set_num_threads(asked)
    return None


def _in_child() -> None:
    """What a forked child does first: OpenMP's threads have not come along, and a region of more than one would wait
    for them for ever. So it computes on one, with the same bits. numba too takes a region of the child's for one of a
    process whose threads are gone, and ends it, until it is told that this process has started anew."""
    torch.set_num_threads(1)
    _process.forked = True
    _last.__dict__.clear()
    openmp = sys.modules.get("numba.np.ufunc.omppool")
    if openmp is not None:
        ctypes.CFUNCTYPE(None, ctypes.c_int)(openmp.launch_threads)(1)


@functools.cache
def let_children_compute() -> None:
    """Makes processes forked from now on able to compute, those that leave Python's own fork."""
    os.register_at_fork(after_in_child=_in_child)


def captured(step: Callable[[], object]) -> Calls:
    """What launchers are asked for with tensors on a CPU while `step` is called; nothing runs."""
    calls: Calls = []

    def collected() -> None:
        _capture.set(calls)
        step()

    # In a context of its own: no interrupt leaves a capture open, as it could where Python code has to close it.
    copy_context().run(collected)
    return calls


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
    if asked == getattr(_last, "asked", None):
        threads = _last.threads
        for kernel, arguments in calls:
            kernel(threads, *arguments)
        return
    import numba

    allowed = 1 if _process.forked else numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # by the affinity
    threads = min(asked, allowed)
    try:
        numba.set_num_threads(threads)
        for kernel, arguments in calls:
            kernel(threads, *arguments)
    finally:  # numba's OpenMP, when it starts, sets the count that PyTorch goes by
        torch.set_num_threads(asked)
    _last.threads, _last.asked = threads, asked  # the latter when all of it is true


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, float):
        import numpy as np

        return np.float32(value)
    return value

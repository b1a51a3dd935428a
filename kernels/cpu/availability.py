"""Whether compiled kernels are available here."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def unusable_numba() -> str | None:
    """Why numba compiles nothing here; None where it does."""
    try:
        numba = importlib.import_module("numba")
        if numba.config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
        importlib.import_module("runtime.kernels.cpu.team")
    except ImportError as error:
        return f"numba is needed: {' '.join(str(error).split())}"
    return None


@functools.cache
def takes_masks() -> bool:
    """Whether the processor that is compiled for takes the bits of a number as a mask of bytes."""
    if unusable_numba():
        return False
    return "+avx512bw" in importlib.import_module("runtime.kernels.cpu.vectors").processor_features()

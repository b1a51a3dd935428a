"""Named ranges of the host's time, for profilers: torch.profiler's while one records, and NVTX's, which Nsight Systems
shows, where GEMMA_RUNTIME_NVTX=1. Without either, a range costs one check of a flag."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import profiler

from runtime.kernels.operation import Operation
from runtime.kernels.ops import Ops

PREFIX = "gemma: "  # of every name, so that a trace can be filtered
NVTX = os.environ.get("GEMMA_RUNTIME_NVTX") == "1" and torch.version.cuda is not None
_NOTHING = nullcontext()


def is_recorded() -> bool:
    """Whether any profiler gets the ranges."""
    return NVTX or profiler._is_profiler_enabled


def marked(name: str) -> AbstractContextManager[Any]:
    """A range around what runs in a `with` block."""
    if profiler._is_profiler_enabled:
        return profiler.record_function(PREFIX + name)
    return torch.cuda.nvtx.range(PREFIX + name) if NVTX else _NOTHING


class MarkedOps(Ops):
    """A backend each of whose operations is a range."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def run(self, operation: Operation) -> None:
        with marked(operation.name):
            self._ops.run(operation)

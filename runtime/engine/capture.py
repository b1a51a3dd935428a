"""Capturing CUDA graphs on whichever GPU a model is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from runtime.kernels.launch import current


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """Records what is launched while it is open into a graph; nothing runs.

    Args:
        graph: empty.
        device: of the tensors that the launches take. PyTorch's own choice is the GPU of the process's first capture.
        pool: a memory pool to share with other graphs of this device.
    """
    with current(device), torch.cuda.graph(graph, pool=pool, stream=_stream(device)):
        yield


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: graphs share a pool's memory only within a stream."""
    return torch.cuda.Stream(device)

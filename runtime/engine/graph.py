"""Captured graphs: operations that are the same every time, recorded once and then replayed."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from runtime.engine.ranges import MarkedOps, is_recorded, marked
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.launch import INTERPRETING, current
from runtime.kernels.ops import Ops, ops_for
from runtime.model.model import Model
from runtime.model.threads import torch_threads

_log = logging.getLogger("gemma_runtime")

Operations = Callable[[Ops], None]  # calls a backend: same order, shapes, scalars and addresses every time
GraphKey = tuple[str, int, int]  # kind of operations, such as "prefill", and two sizes that distinguish them within it


def ops_of(model: Model) -> Ops:
    """The backend of a model's operations where they are not captured on a CPU."""
    return ops_for(model.device, model.runtime.max_batch)


class CapturedGraph:
    """Operations warmed up, captured and replayed: as a CUDA graph on a GPU, as calls of compiled kernels on a CPU.

    A CUDA graph does not keep the tensors that it works on alive, so it is stored in the state that owns them.
    """

    def __init__(self, model: Model) -> None:
        self.pool: Any = None  # the graph's memory, which others of the same state share
        self._device, self._threads, self._ops = model.device, model.runtime.threads, ops_of(model)
        self._replay: Callable[..., None] | None = None

    def warm_up(self, operations: Operations) -> None:
        """Runs operations plainly where a capture needs that: on a GPU, to compile and load their kernels."""
        if self._device.type == "cuda":
            operations(self._ops)

    def capture(self, operations: Operations, pool: Any = None) -> None:
        """Records the operations; nothing runs. `pool` is the memory pool of another graph, to be shared."""
        if self._device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with current(self._device), torch.cuda.graph(graph, pool=pool, stream=_capture_stream(self._device)):
                operations(self._ops)
            self.pool, self._replay = graph.pool(), graph.replay
        else:
            self.pool = {} if pool is None else pool
            self._replay = functools.partial(_run_calls, cpu_calls.captured(operations, self.pool), self._threads)

    def replay(self, **rows: int) -> None:
        """Runs the operations. On a GPU it returns at once, and the device runs them in stream order. On a CPU `rows`
        may say how many of the last rows they compute (see cpu_calls.run)."""
        assert self._replay is not None, "replay needs a capture"
        self._replay(**rows)


def _run_calls(calls: cpu_calls.Calls, threads: int, rows: int | None = None) -> None:
    """Runs compiled calls: as one program or, while ranges are recorded, each in a range of its own."""
    if not is_recorded():
        cpu_calls.run(calls, threads, rows)
        return
    for name, call in calls.one_by_one():
        with marked(name):
            cpu_calls.run(call, threads, rows)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device: graphs share a pool's memory only within a stream."""
    return torch.cuda.Stream(device)


def captured(
    model: Model,
    graphs: dict[GraphKey, CapturedGraph | None],
    key: GraphKey,
    operations: Operations,
    warm_up: Operations | None = None,
) -> CapturedGraph | None:
    """The graph of some operations, captured on first use.

    Args:
        model: the model that the operations run.
        graphs: the graphs of one state, in which this one is looked up and, once complete, stored: a capture that is
            interrupted is repeated.
        key: identifies the operations.
        operations: what is captured.
        warm_up: runs the same kernels before a capture on a GPU; None where the operations have just run.

    Returns:
        The graph; or None, where the operations have to run plainly: the model is `eager`, a CPU has no compiled
        kernels or, with one warning that names the cause, a GPU's capture of this kind of operations has failed.
    """
    if key in graphs:
        return graphs[key]
    on_cpu = model.device.type == "cpu"
    failed = any(graph is None and kind == key[0] for (kind, *_), graph in graphs.items())
    if model.runtime.eager or failed or (on_cpu and cpu_calls.missing(model.dtype)):
        return None
    graph = CapturedGraph(model)
    pool = next((other.pool for other in graphs.values() if isinstance(other, CapturedGraph)), None)
    if warm_up is not None:
        graph.warm_up(warm_up)
    try:
        with marked(f"capture, {key[0]}"):
            graph.capture(operations, pool)
    except RuntimeError as error:
        if on_cpu or isinstance(error, RecursionError):  # caused by the caller's depth, not the operations
            raise
        graphs[key] = None
        _log.info("the capture of %s failed: %s", key, error)
        warnings.warn(f"{key[0]} without a CUDA graph, since its capture failed: {error}", stacklevel=3)
        return None
    graphs[key] = graph
    _log.info("captured %s as %s", key, "compiled calls" if on_cpu else "a CUDA graph")
    return graph


def runs_compiled(model: Model) -> bool:
    """Whether a model runs the compiled CPU kernels."""
    return model.device.type == "cpu" and not model.runtime.eager and cpu_calls.missing(model.dtype) is None


def runs_triton(model: Model) -> bool:
    """Whether a model's decode steps run Triton's kernels."""
    return model.device.type != "cpu" or INTERPRETING


def run_plainly(model: Model, operations: Operations) -> None:
    """Runs operations that are not captured, on a CPU with the model's number of threads."""
    with torch_threads(model.runtime.threads) if model.device.type == "cpu" else nullcontext():
        ops = ops_of(model)
        operations(MarkedOps(ops) if is_recorded() else ops)

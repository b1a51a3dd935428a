"""What a check runs kernels on: a GPU, Triton's interpreter, or the kernels compiled for this CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.check.case import Case
from runtime.errors import InvalidArgument
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.launch import INTERPRETING, gpu_of
from runtime.kernels.operation import Operation
from runtime.kernels.ops import Ops, TritonOps

INTERPRET = "interpret"
Way = Callable[[Case], Callable[..., None]]


class CompiledOps(Ops):
    """A CPU's compiled kernels, each captured as a decode loop captures a step, and then run at once.

    Args:
        threads: how many run it; None for as many as PyTorch would use.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def run(self, operation: Operation) -> None:
        cpu_calls.run(cpu_calls.captured(lambda ops: ops.run(operation)), self.threads)


@dataclass(frozen=True)
class Backend:
    """Kernels to check.

    Attributes:
        kind: "cuda", "interpret" or "cpu".
        device: where their tensors are.
        ways: how a case can be run, by name: what differs may give other bits.
        equal: ways that have to give the same bits; batches are run in them in turn.
        missing: why there are no kernels for a dtype here; None where there are.
    """

    kind: str
    device: str
    ways: Mapping[str, Way]
    equal: Sequence[Way]
    missing: Callable[[torch.dtype], str | None] = lambda dtype: None

    @property
    def is_triton(self) -> bool:
        return self.kind != "cpu"


def triton_backend(device: str) -> Backend:
    """Triton's kernels on a GPU, or on the CPU in the interpreter."""
    gpu = gpu_of(torch.device(device))
    one_row, more = TritonOps(gpu, 1), TritonOps(gpu, 8)
    ways: dict[str, Way] = {
        "a model of one row": lambda case: case.row_by_row(one_row),
        "a model of 8 rows": lambda case: _of_several_rows(case, more),
    }
    return Backend("cuda" if gpu else INTERPRET, device, ways, (ways["a model of 8 rows"],))


def _of_several_rows(case: Case, ops: Ops) -> Callable[..., None]:
    """A case's call on a backend of several rows, whose looped products of a norm need a workspace."""
    if "norm_weight" not in case.inputs or "normed_out" in case.outputs:
        return case.on(ops)
    return lambda **arguments: case.call(ops, **arguments, normed=torch.full_like(arguments["x"], torch.nan))


def compiled_backend() -> Backend:
    """The kernels that numba compiles for this CPU, which give the same bits on any number of threads."""

    def on(threads: int | None) -> Way:
        return lambda case: case.on(CompiledOps(threads))

    ways = {"1 thread": on(1), "7 threads": on(7)}  # 7 divides nothing here
    return Backend("cpu", "cpu", ways, (on(None), on(1), on(2), on(7)), _no_compiled_kernels)


def _no_compiled_kernels(dtype: torch.dtype) -> str | None:
    why = cpu_calls.missing(dtype)
    return f"no compiled kernels: {why}" if why else None


def backend_for(device: str) -> Backend:
    """The backend of a resolved device: "cpu", "cuda", "cuda:N", or "interpret" for Triton's interpreter.

    Raises:
        InvalidArgument: the interpreter was not chosen before kernels were imported, or was for a GPU.
    """
    if device == INTERPRET and not INTERPRETING:
        raise InvalidArgument("device interpret: expected TRITON_INTERPRET=1 in the environment, which is not set")
    if device.startswith("cuda") and INTERPRETING:
        raise InvalidArgument(f"device {device}: expected no TRITON_INTERPRET=1 in the environment, which is set")
    if device == "cpu":
        return compiled_backend()
    return triton_backend("cpu" if device == INTERPRET else device)

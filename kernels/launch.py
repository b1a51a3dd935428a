"""The one way to launch a Triton kernel: for which GPU, with which options, with which arguments."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from runtime.kernels.triton_function import TritonFunction, constexpr, gdc_launch_dependents, gdc_wait, jit, tl

MULTIPROCESSOR_REGISTERS = 65536  # of every GPU from sm_80 on
# Triton reads this variable as it makes its kernels; here it is read once.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IN_INTERPRETER = constexpr(INTERPRETING)  # the same, for kernels to read


class Gpu(NamedTuple):
    """The properties of a GPU that a launch depends on."""

    name: str  # as its driver gives it
    capability: int  # 90 for sm_90
    multiprocessors: int


@functools.cache
def _cuda_gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU behind a device; None where there is none."""
    if device.type != "cuda":
        return None
    return _cuda_gpu(torch.cuda.current_device() if device.index is None else device.index)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU current in a `with` block: Triton, streams, events and captures use the current GPU, not their
    tensors' own. A no-op on other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def dependent_launch(gpu: Gpu | None) -> bool:
    """Whether kernels use programmatic dependent launch: on GPUs that have it (sm_90 on), unless
    GEMMA_RUNTIME_DEPENDENT_LAUNCH=0."""
    return gpu is not None and gpu.capability >= 90 and os.environ.get("GEMMA_RUNTIME_DEPENDENT_LAUNCH", "1") != "0"


class Launcher:
    """Launches kernels with the options that all of them share.

    Args:
        gpu: runs them and selects their block shapes; None in the interpreter.
        max_rows: the most rows that any launch will have; None where that is not known. It selects the form of the
            products, so that a row's bits do not depend on how many rows a launch has.
    """

    def __init__(self, gpu: Gpu | None, max_rows: int | None = None) -> None:
        self.gpu = gpu
        self.max_rows = max_rows
        self._dependent = dependent_launch(gpu)

    def __call__(
        self,
        kernel: TritonFunction,
        operation: Any,
        grid: tuple[int, ...],
        warps: int,
        *,
        two_programs: bool = False,
        **extra: Any,
    ) -> None:
        """Launches one kernel.

        Args:
            kernel: a Triton kernel with the compile-time flag USE_DEPENDENT_LAUNCH, its integers in do_not_specialize:
                Triton specialises others on values of 1 and multiples of 16, so that a row alone would run a different
                program than in a batch, with different bits.
            operation: fills the kernel's parameters by name: `x_ptr` with its field x, `eps` with its field eps,
                HAS_BRANCH with whether its field branch is given.
            grid: number of programs in each dimension.
            warps: of one program.
            two_programs: limits the compiler to the registers that let two programs share a multiprocessor, and lets it
                use them all. Otherwise it picks an occupancy itself.
            extra: parameters that are not fields of the operation, or differ from them: sizes, blocks, views.
        """
        extra["USE_DEPENDENT_LAUNCH"] = self._dependent
        arguments: dict[str, Any] = {}
        for parameter, field, is_flag in fields_of(kernel.made):
            if parameter in extra:
                arguments[parameter] = extra.pop(parameter)
            else:
                value = getattr(operation, field)
                arguments[parameter] = value is not None if is_flag else value
        arguments |= extra  # the kernel has no such parameter: Triton refuses them
        # FMA contraction is pinned: its default depends on Triton's version, and a sum's bits depend on it.
        options: dict[str, Any] = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
        if self._dependent:  # the interpreter and GPUs without the feature know no such option
            options["launch_pdl"] = True
        if two_programs and not INTERPRETING:
            options["maxnreg"] = min(MULTIPROCESSOR_REGISTERS // (2 * 32 * warps), 255)
        self._start(kernel.made, grid, arguments, options, operation)

    def _start(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any], operation: Any
    ) -> None:
        with current(operation.device):
            kernel[grid](**arguments, **options)


@functools.cache
def fields_of(kernel: Any) -> list[tuple[str, str, bool]]:
    """Where each parameter of a kernel comes from: (parameter, field of the operation, whether it is a HAS_ flag, which
    says if that field is given)."""
    return [
        (name, name[4:].lower() if name.startswith("HAS_") else name.removesuffix("_ptr"), name.startswith("HAS_"))
        for name in kernel.arg_names
    ]


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any  # a Triton JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the kernel's parameter names, compile-time constants included
    options: dict[str, Any]


class Recorder(Launcher):
    """Records launches instead of making them, for tensors on the device "meta", which have no data. No GPU needed."""

    def __init__(self, gpu: Gpu, max_rows: int | None = None) -> None:
        super().__init__(gpu, max_rows)
        self.launches: list[Launch] = []

    def _start(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any], operation: Any
    ) -> None:
        self.launches.append(Launch(kernel, grid, arguments, options))


@jit
def let_next_kernel_start(USE_DEPENDENT_LAUNCH: tl.constexpr):
    """Lets the next kernel's programs take free multiprocessors and load their weights while this one runs."""
    if USE_DEPENDENT_LAUNCH:
        gdc_launch_dependents()


@jit
def wait_for_previous_kernel(USE_DEPENDENT_LAUNCH: tl.constexpr):
    """Waits until all earlier kernels have finished. A program calls this before it touches an activation; before that
    it may read only what no kernel of this step changes: weights, and in decode_attention's two kernels
    the position and the older keys. Some program of each kernel always waits, so a kernel ends after all those
    before it."""
    if USE_DEPENDENT_LAUNCH:
        gdc_wait()

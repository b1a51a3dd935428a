"""The one way to launch a kernel: whether one runs at all, for which GPU, with which options, in which order."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MULTIPROCESSOR_REGISTERS = 65536  # of every GPU from sm_80 on
# Triton reads this variable when a kernel's module is imported, so it is read once here too.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IN_INTERPRETER: tl.constexpr = tl.constexpr(INTERPRETING)  # the same, for kernels to read


class Gpu(NamedTuple):
    """What launches depend on of the GPU they are for."""

    name: str  # as its driver gives it
    capability: int  # 90 for sm_90
    multiprocessors: int


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any  # a Triton JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the kernel's parameter names, compile-time constants included
    options: dict[str, Any]


_recording: ContextVar[tuple[Gpu, list[Launch]] | None] = ContextVar("recording", default=None)


@contextmanager
def recorded(gpu: Gpu) -> Iterator[list[Launch]]:
    """Collects what launchers do with tensors on the device "meta", which have shapes and no data, as if for `gpu`:
    nothing is launched and no GPU is needed."""
    launches: list[Launch] = []
    token = _recording.set((gpu, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def use_kernel(tensor: torch.Tensor) -> bool:
    """Whether a launcher runs its Triton kernel (tensors on a GPU, the interpreter, or launches are only recorded)
    or its reference."""
    return tensor.is_cuda or INTERPRETING or (tensor.is_meta and _recording.get() is not None)


@functools.cache
def _cuda_gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU behind a device: its own, the recording's for "meta", none in the interpreter."""
    if device.type == "cuda":
        return _cuda_gpu(torch.cuda.current_device() if device.index is None else device.index)
    recording = _recording.get()
    return recording[0] if recording and device.type == "meta" else None


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one for a while: Triton, streams, events and captures go by that, not by where tensors
    are. Nothing to do elsewhere."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def dependent_launch(gpu: Gpu | None) -> bool:
    """Whether kernels use programmatic dependent launch: on GPUs that have it (sm_90 on), unless
    GEMMA_RUNTIME_DEPENDENT_LAUNCH=0."""
    return gpu is not None and gpu.capability >= 90 and os.environ.get("GEMMA_RUNTIME_DEPENDENT_LAUNCH", "1") != "0"


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    warps: int,
    *arguments: Any,
    two_programs: bool = False,
    **constants: Any,
):
    """Launches a kernel with the options that all kernels share; every launch of a decode step comes through here.

    Args:
        kernel: a Triton kernel with the compile-time flag USE_DEPENDENT_LAUNCH, its integers in do_not_specialize:
            Triton compiles others anew where they are 1 or a multiple of 16, so that a row alone would run another
            program than among several, with other bits.
        grid: its programs.
        device: where its tensors are; on "meta" the launch is recorded instead.
        warps: of one program.
        arguments, constants: what the kernel takes, by place and by name.
        two_programs: holds the compiler to the registers that let two programs share a multiprocessor, and lets it use
            them all. Left alone it goes by its own idea of how many programs there should be.
    """
    dependent = dependent_launch(gpu_of(device))
    # Fusing a product into a sum is fixed: the default changes between versions of Triton, and a sum's bits with it.
    options: dict[str, Any] = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    if dependent:  # the interpreter and GPUs without the feature know no such option
        options["launch_pdl"] = True
    if two_programs and not INTERPRETING:
        options["maxnreg"] = min(MULTIPROCESSOR_REGISTERS // (2 * 32 * warps), 255)
    recording = _recording.get()
    if recording and device.type == "meta":
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants | {"USE_DEPENDENT_LAUNCH": dependent}
        recording[1].append(Launch(kernel, grid, given, options))
        return
    with current(device):
        kernel[grid](*arguments, **constants, USE_DEPENDENT_LAUNCH=dependent, **options)


@triton.jit
def let_next_kernel_start(USE_DEPENDENT_LAUNCH: tl.constexpr):
    """Lets the next kernel's programs take free multiprocessors and load their weights while this one runs."""
    if USE_DEPENDENT_LAUNCH:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(USE_DEPENDENT_LAUNCH: tl.constexpr):
    """Waits until all earlier kernels have finished. A program calls this before it touches an activation; it may read
    before only what no kernel of this step changes: weights, and in decode_attention and output_projection the position
    and the older keys.
    As some program of each kernel always waits, the end of one kernel implies the end of all before it."""
    if USE_DEPENDENT_LAUNCH:
        gdc_wait()

"""What every launcher does first: decide between kernel and reference, and check its arguments.

Checks run before anything is launched and cost well under a microsecond each when they pass: the messages are put
together only once something is wrong.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 8
MULTIPROCESSOR_REGISTERS = 65536  # of every GPU from sm_80 on
# Triton reads this variable when a kernel's module is imported, so it is read once here too.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IN_INTERPRETER: tl.constexpr = tl.constexpr(INTERPRETING)  # the same, for kernels to read


def use_kernel(tensor: torch.Tensor) -> bool:
    """Whether a launcher runs its Triton kernel (tensors on a GPU, the interpreter is on, or tensors without data whose
    launches are only recorded) or its reference."""
    return tensor.is_cuda or tensor.is_meta or INTERPRETING


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


_recording: ContextVar[tuple[Gpu, list[Launch]]] = ContextVar("recording")


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


@functools.cache
def _cuda_gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU behind a device: its own, the recording's for "meta", none in the interpreter."""
    if device.type == "cuda":
        return _cuda_gpu(device.index or 0)
    return _recording.get()[0] if device.type == "meta" else None


class Block(NamedTuple):
    """How a matrix-vector kernel is cut: weight rows and columns of one program, and its warps."""

    rows: int
    columns: int
    warps: int


# Weight elements that one thread holds at once: enough 16-byte loads in flight, few enough registers for two programs
# a multiprocessor.
ELEMENTS_PER_THREAD = 64


def default_block(outputs: int, width: int, matrices: int = 1) -> Block:
    """The block of a shape that no table lists: whole weight rows, 8192 elements (or one row) a program."""
    columns = triton.next_power_of_2(width)
    elements = max(columns * matrices, 8192)
    warps = min(max(elements // (32 * ELEMENTS_PER_THREAD), 4), 16)
    return Block(min(elements // (columns * matrices), triton.next_power_of_2(outputs)), columns, warps)


@functools.cache
def _block_table(gpu_name: str) -> dict[str, list[int]]:
    """The measured blocks of a GPU, from blocks/<its name>.json; empty where it has none."""
    path = Path(__file__).parent / "blocks" / f"{gpu_name.lower().replace(' ', '-')}.json"
    return json.loads(path.read_text())["blocks"] if path.exists() else {}


@functools.cache
def listed_block(kernel: str, outputs: int, width: int, dtype: torch.dtype, gpu: Gpu | None) -> Block | None:
    """The block that the GPU's table has for this shape, if any."""
    listed = _block_table(gpu.name) if gpu else {}
    block = listed.get(f"{kernel}:{outputs}x{width}:{str(dtype).removeprefix('torch.')}")
    return None if block is None else Block(*block)


def block_for(kernel: str, outputs: int, width: int, x: torch.Tensor, matrices: int = 1) -> Block:
    """The block shape of one launch on x's dtype and device: the GPU's table if it lists this shape, else
    `default_block`.

    A block shape fixes the order of a row's sums, so it may depend on the shape of the weights and on the GPU, but on
    nothing that changes from step to step, the number of rows included.
    """
    listed = listed_block(kernel, outputs, width, x.dtype, gpu_of(x.device))
    return listed or default_block(outputs, width, matrices)


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
        kernel: a Triton kernel with the compile-time flag USE_DEPENDENT_LAUNCH.
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
    if device.type == "meta":
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants | {"USE_DEPENDENT_LAUNCH": dependent}
        _recording.get()[1].append(Launch(kernel, grid, given, options))
        return
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


@triton.jit
def held_packed(weight):
    """The weights as they are, through a line of assembly that stays inside the loop over rows. Without it compilers
    widen them to fp32 once, ahead of the loop, and hold twice the registers: too many for two programs."""
    if IN_INTERPRETER:
        return weight
    else:
        PACK: tl.constexpr = 32 // weight.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weight], weight.dtype, is_pure=False, pack=PACK)


def check(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Checks that `tensor` is contiguous and has exactly this shape, dtype and device.

    Raises:
        TypeError: it is no tensor, or has another dtype.
        ValueError: another shape, device or a stride other than the contiguous one.
    """
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.device == device
        and tensor.is_contiguous()
    ):
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape}, got {type(tensor).__name__}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()} for shape {shape}")


def check_rows(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Checks a contiguous floating-point [rows, width] with 1 to MAX_ROWS rows, and returns its two sizes.

    Raises:
        TypeError: it is no tensor, or not of a floating-point dtype.
        ValueError: another rank, too many or no rows, or not contiguous.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor [rows, width], got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions [rows, width], got shape {tuple(tensor.shape)}")
    rows, width = tensor.shape
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{name}: expected 1 to {MAX_ROWS} rows, got {rows}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return rows, width


def check_weight(name: str, tensor: torch.Tensor, width: int, x: torch.Tensor) -> int:
    """Checks a weight matrix [outputs, width] of x's dtype and device, and returns its number of outputs."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: expected a matrix [outputs, {width}], got {given}")
    outputs = tensor.shape[0]
    check(name, tensor, (outputs, width), x.dtype, x.device)
    return outputs


def check_stream(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    branch_norm: torch.Tensor | None,
    x_out: torch.Tensor | None,
    *,
    stored: bool = True,
) -> None:
    """Checks the optional branch that a kernel adds to the residual stream x: all three given, or none.

    `stored` says whether the kernel writes the new stream at all; x_out may not be x itself, since every program
    still reads x while one of them stores.
    """
    if branch is None:
        if branch_norm is not None or x_out is not None:
            raise ValueError("branch_norm and x_out: expected None without a branch, got a tensor")
        return
    check("branch", branch, tuple(x.shape), x.dtype, x.device)
    check("branch_norm", branch_norm, (x.shape[1],), x.dtype, x.device)
    if stored:
        check("x_out", x_out, tuple(x.shape), x.dtype, x.device)
        assert x_out is not None
        if x_out is x or x_out.data_ptr() == x.data_ptr() != 0:  # 0 on "meta", where nothing has an address
            raise ValueError("x_out: expected a buffer other than x, got x itself")

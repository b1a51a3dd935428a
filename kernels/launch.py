"""What every launcher does first: decide between kernel and reference, and check its arguments.

Checks run before anything is launched and cost well under a microsecond each when they pass: the messages are put
together only once something is wrong.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 8
# Triton reads this variable when a kernel's module is imported, so it is read once here too.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def use_kernel(tensor: torch.Tensor) -> bool:
    """Whether a launcher runs its Triton kernel (tensors on a GPU, or the interpreter is on) or its reference."""
    return tensor.is_cuda or INTERPRETING


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
def _block_table(device_index: int) -> dict[str, list[int]]:
    """The measured blocks of this GPU, from blocks/<its name>.json; empty where it has none."""
    name = torch.cuda.get_device_name(device_index).lower().replace(" ", "-")
    path = Path(__file__).parent / "blocks" / f"{name}.json"
    return json.loads(path.read_text())["blocks"] if path.exists() else {}


@functools.cache
def block_for(kernel: str, outputs: int, width: int, dtype: torch.dtype, device: torch.device, matrices: int) -> Block:
    """The block shape of one launch: the GPU's table if it lists this shape, else `default_block`.

    A block shape fixes the order of a row's sums, so it may depend on the shape of the weights and on the GPU, but on
    nothing that changes from step to step, the number of rows included.
    """
    if device.type == "cuda":
        listed = _block_table(device.index or 0).get(f"{kernel}:{outputs}x{width}:{str(dtype).removeprefix('torch.')}")
        if listed is not None:
            return Block(*listed)
    return default_block(outputs, width, matrices)


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether kernels use programmatic dependent launch: on GPUs that have it (sm_90 on), unless
    GEMMA_RUNTIME_DEPENDENT_LAUNCH=0."""
    wanted = os.environ.get("GEMMA_RUNTIME_DEPENDENT_LAUNCH", "1") != "0"
    return wanted and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def options(device: torch.device, warps: int) -> dict[str, int | bool]:
    """The launch options that every kernel shares. Fusing a product into a sum is fixed here, since the default changes
    between versions of Triton and the bits of a sum with it."""
    dependent = dependent_launch(device)
    shared: dict[str, int | bool] = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    # The interpreter and GPUs without the feature know no such option.
    return {**shared, "launch_pdl": True} if dependent else shared


@triton.jit
def let_next_kernel_start(USE_DEPENDENT_LAUNCH: tl.constexpr):
    """Lets the next kernel's programs take free multiprocessors and load their weights while this one runs."""
    if USE_DEPENDENT_LAUNCH:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(USE_DEPENDENT_LAUNCH: tl.constexpr):
    """Waits until all earlier kernels have finished. A program calls this before it touches an activation; it may read
    before only what no kernel of this step changes: weights, and in decode_attention the position and the older keys.
    As some program of each kernel always waits, the end of one kernel implies the end of all before it."""
    if USE_DEPENDENT_LAUNCH:
        gdc_wait()


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
        if x_out.data_ptr() == x.data_ptr():
            raise ValueError("x_out: expected a buffer other than x, got x itself")

"""Gemma's RMSNorm, with and without a residual add.

    y = d(x * rsqrt(mean(x^2) + eps) * (1 + weight))        in fp32 from x to y, rounded once
    y = d(residual + y)                                     where there is a residual

d is the dtype of x. Llama's norm rounds before the weight instead; that differs in about a third of the elements.
Bytes moved: x once, the residual once, y once; the weight is small and stays in cache.
Source: Gemma3RMSNorm in transformers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.checks import check
from runtime.kernels.launch import launch, let_next_kernel_start, use_kernel, wait_for_previous_kernel


def rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The norm of x over its last dimension as Hugging Face computes it, plus the residual if one is given."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = (normed * (1.0 + weight.float())).to(x.dtype)
    return normed if residual is None else residual + normed


def residual_torch(
    x: torch.Tensor, branch: torch.Tensor | None, branch_norm: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The residual stream after a branch has joined it: x, or d(x + rms_norm(branch)) for Gemma 2 and 3."""
    if branch is None:
        return x
    assert branch_norm is not None
    return rms_norm_torch(branch, branch_norm, eps, residual=x)


@triton.jit
def normed_row(x, norm_weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """The norm of one row, fp32 in and out, rounded to the model's dtype; lanes past WIDTH hold zeros."""
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    # Rounded once, after the weight: Hugging Face's order for Gemma.
    return (x * inverse * (1.0 + norm_weight)).to(dtype).to(tl.float32)


@triton.jit
def residual_row(
    residual_out_ptr,
    x_ptr,
    branch_ptr,
    branch_norm,
    row,
    columns,
    stored,
    eps,
    WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    STORE_RESIDUAL: tl.constexpr,
):
    """One row of the residual stream in fp32, after a branch has joined it; the program with `stored` = WIDTH
    keeps it for later kernels."""
    mask = columns < WIDTH
    x = tl.load(x_ptr + row * WIDTH + columns, mask=mask, other=0.0)
    dtype = x_ptr.dtype.element_ty
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        # The stream is always in the model's dtype.
        x = (x.to(tl.float32) + normed_row(branch, branch_norm, eps, WIDTH, dtype)).to(dtype)
        if STORE_RESIDUAL:
            tl.store(residual_out_ptr + row * WIDTH + columns, x, mask=columns < stored)
    return x.to(tl.float32)


@triton.jit
def rms_norm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    eps,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program normalises one row.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    mask = columns < WIDTH
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    x = tl.load(x_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    y = normed_row(x, weight, eps, WIDTH, dtype)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, y.to(dtype), mask=mask)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalises x over its last dimension.

    Args:
        x: [..., hidden], floating point, contiguous.
        weight: [hidden], as in the checkpoint (the multiplier is 1 + weight).
        eps: added to the mean square.
        residual: [..., hidden] added to the rounded result, or None.
        out: [..., hidden] written to (may be x or residual), or None to allocate.

    Returns:
        `out`, or the new tensor, in the dtype of x.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    shape = tuple(x.shape)
    check("x", x, shape, x.dtype, x.device)
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
    check("weight", weight, shape[-1:], x.dtype, x.device)
    if residual is not None:
        check("residual", residual, shape, x.dtype, x.device)
    if out is not None:
        check("out", out, shape, x.dtype, x.device)
    if use_kernel(x):
        out = torch.empty_like(x) if out is None else out
        width = shape[-1]
        launch(
            rms_norm_kernel,
            (x.numel() // width,),
            x.device,
            4,
            out,
            x,
            weight,
            residual,
            eps,
            WIDTH=width,
            HAS_RESIDUAL=residual is not None,
            BLOCK_WIDTH=triton.next_power_of_2(width),
        )
        return out
    normed = rms_norm_torch(x, weight, eps, residual)
    return normed if out is None else out.copy_(normed)

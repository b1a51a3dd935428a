"""Gemma's RMSNorm, with and without a residual add.

    y = d(x * rsqrt(mean(x^2) + eps) * (1 + weight))        in fp32 from x to y, rounded once
    y = d(residual + y)                                     where there is a residual

d is the dtype of x. Llama's norm rounds before the weight instead; that differs in about a third of the elements.
Bytes moved: x once, the residual once, y once; the weight is small and stays in cache.
Source: Gemma3RMSNorm in transformers.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import triton
import triton.language as tl

from runtime.kernels.checks import check
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import Operation


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
    """The residual after a branch is added: x, or d(x + rms_norm(branch)) for Gemma 2 and 3."""
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
    """One row of the residual in fp32, after a branch is added; the program with `stored` = WIDTH keeps it for later
    kernels."""
    mask = columns < WIDTH
    x = tl.load(x_ptr + row * WIDTH + columns, mask=mask, other=0.0)
    dtype = x_ptr.dtype.element_ty
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        # The residual is always in the model's dtype.
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


@dataclass(frozen=True, eq=False, repr=False)
class RmsNorm(Operation):
    """Normalises x over its last dimension, and adds a residual if one is given.

    Args:
        out: [..., hidden], written; may be x or residual.
        x: [..., hidden], floating point, contiguous.
        weight: [hidden], as in the checkpoint (the multiplier is 1 + weight).
        residual: [..., hidden] added to the rounded result, or None.
        eps: added to the mean square.
    """

    name = "rms_norm"

    out: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    _: KW_ONLY
    residual: torch.Tensor | None = None
    eps: float

    def check(self) -> None:
        if not self.x.is_floating_point():
            raise TypeError(f"x: expected a floating-point dtype, got {self.x.dtype}")
        shape, dtype, device = tuple(self.x.shape), self.x.dtype, self.x.device
        check("x", self.x, shape, dtype, device)
        check("weight", self.weight, shape[-1:], dtype, device)
        check("out", self.out, shape, dtype, device)
        if self.residual is not None:
            check("residual", self.residual, shape, dtype, device)

    def run_torch(self) -> None:
        self.out.copy_(rms_norm_torch(self.x, self.weight, self.eps, self.residual))

    def run_triton(self, launch: Launcher) -> None:
        width = self.x.shape[-1]
        launch(
            rms_norm_kernel,
            self,
            (self.x.numel() // width,),
            warps=4,
            WIDTH=width,
            BLOCK_WIDTH=triton.next_power_of_2(width),
        )

"""Gemma's RMSNorm, with and without a residual add.

    y = d(x * rsqrt(mean(x^2) + eps) * (1 + weight))        in fp32 from x to y, rounded once
    y = d(residual + y)                                     where there is a residual

and between two branches of a layer, in one launch:

    residual = d(x + branch), or d(x + rms_norm(branch))    Gemma 1, or 2 and 3
    normed   = rms_norm(residual)

d is the dtype of x. Llama's norm rounds before the weight instead; that differs in about a third of the elements.
Bytes moved: x once, the residual once, y once; the weight is small and stays in cache.
Source: Gemma3RMSNorm in transformers.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from runtime.kernels.checks import MAX_TOKENS, check, check_residual, check_rows
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import Operation
from runtime.kernels.pieces import norm_pieces, row_pieces, store_pieces, sum_of
from runtime.kernels.triton_function import jit, next_power_of_2, tl


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
    """The residual after a branch is added, if there is one: d(x + branch), or d(x + rms_norm(branch)) for Gemma 2 and
    3."""
    if branch is None:
        return x
    if branch_norm is None:
        return x + branch
    return rms_norm_torch(branch, branch_norm, eps, residual=x)


@jit
def normed_pieces(pieces, norm_weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """The norm of one row in pieces, fp32 in and out, rounded to the model's dtype; lanes past WIDTH hold zeros."""
    squares, normed = (), ()
    for i in tl.static_range(len(pieces)):
        squares += (pieces[i] * pieces[i],)
    inverse = tl.rsqrt(sum_of(squares) / WIDTH + eps)
    for i in tl.static_range(len(pieces)):
        # Rounded once, after the weight: Hugging Face's order for Gemma.
        normed += ((pieces[i] * inverse * (1.0 + norm_weight[i])).to(dtype).to(tl.float32),)
    return normed


@jit
def residual_pieces(
    residual_out_ptr,
    x_ptr,
    branch_ptr,
    branch_norm,
    row,
    limit,
    eps,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    STORE_RESIDUAL: tl.constexpr,
    NORM_BRANCH: tl.constexpr = True,
    GROUPS: tl.constexpr = 1,
):
    """One row of the residual, in pieces in fp32, after a branch (in most models its norm) is added; columns below
    `limit` are stored for later kernels."""
    x = row_pieces(x_ptr + row * WIDTH, WIDTH, PIECE, GROUPS)
    if HAS_BRANCH:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        branch = row_pieces(branch_ptr + row * WIDTH, WIDTH, PIECE, GROUPS)
        if NORM_BRANCH:
            branch = normed_pieces(branch, branch_norm, eps, WIDTH, dtype)
        residual = ()
        for i in tl.static_range(len(x)):
            # The residual is always in the model's dtype.
            residual += ((x[i] + branch[i]).to(dtype).to(tl.float32),)
        if STORE_RESIDUAL:
            store_pieces(residual_out_ptr + row * WIDTH, residual, limit, WIDTH, PIECE, GROUPS)
        return residual
    else:
        return x


@jit
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
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    weight = norm_pieces(weight_ptr, WIDTH, BLOCK_WIDTH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    x = row_pieces(x_ptr + row * WIDTH, WIDTH, BLOCK_WIDTH)
    y = normed_pieces(x, weight, eps, WIDTH, dtype)
    if HAS_RESIDUAL:
        y = (y[0] + row_pieces(residual_ptr + row * WIDTH, WIDTH, BLOCK_WIDTH)[0],)
    store_pieces(out_ptr + row * WIDTH, y, WIDTH, WIDTH, BLOCK_WIDTH)


@jit
def residual_norm_kernel(
    normed_ptr,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    branch_ptr,
    branch_norm_ptr,
    eps,
    WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    NORM_BRANCH: tl.constexpr,
    STORE_RESIDUAL: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program adds the branch, if there is one, to one row and normalises it, for a product that does not norm its
    # rows itself.
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    norm_weight = norm_pieces(norm_weight_ptr, WIDTH, BLOCK_WIDTH)
    branch_norm = norm_weight
    if HAS_BRANCH and NORM_BRANCH:
        branch_norm = norm_pieces(branch_norm_ptr, WIDTH, BLOCK_WIDTH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    x = residual_pieces(
        residual_out_ptr,
        x_ptr,
        branch_ptr,
        branch_norm,
        row,
        WIDTH,
        eps,
        WIDTH,
        BLOCK_WIDTH,
        HAS_BRANCH,
        STORE_RESIDUAL,
        NORM_BRANCH,
    )
    store_pieces(normed_ptr + row * WIDTH, normed_pieces(x, norm_weight, eps, WIDTH, dtype), WIDTH, WIDTH, BLOCK_WIDTH)


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
            BLOCK_WIDTH=next_power_of_2(width),
        )


@dataclass(frozen=True, eq=False, repr=False)
class ResidualNorm(Operation):
    """Adds a branch to the residual, if one is given, and normalises the sum.

    Args:
        normed: [rows, hidden], written.
        residual_out: [rows, hidden], written: the residual with the branch; given with `branch`, not x itself.
        x: [rows, hidden], the residual.
        norm_weight: [hidden] (multiplier 1 + weight).
        branch: [rows, hidden], or None.
        branch_norm: [hidden], a norm of the branch before it is added; None for no such norm.
        eps: of both norms.
    """

    name = "residual_norm"

    normed: torch.Tensor
    residual_out: torch.Tensor | None
    x: torch.Tensor
    norm_weight: torch.Tensor
    _: KW_ONLY
    branch: torch.Tensor | None = None
    branch_norm: torch.Tensor | None = None
    eps: float

    def check(self) -> None:
        _, hidden = check_rows("x", self.x, MAX_TOKENS)
        check("normed", self.normed, tuple(self.x.shape), self.x.dtype, self.x.device)
        check("norm_weight", self.norm_weight, (hidden,), self.x.dtype, self.x.device)
        check_residual(self.x, self.branch, self.branch_norm, self.residual_out, normed=self.branch_norm is not None)

    def run_torch(self) -> None:
        residual = residual_torch(self.x, self.branch, self.branch_norm, self.eps)
        if self.residual_out is not None:
            self.residual_out.copy_(residual)
        self.normed.copy_(rms_norm_torch(residual, self.norm_weight, self.eps))

    def run_triton(self, launch: Launcher) -> None:
        rows, width = self.x.shape
        launch(
            residual_norm_kernel,
            self,
            (rows,),
            warps=4,
            WIDTH=width,
            NORM_BRANCH=self.branch_norm is not None,
            STORE_RESIDUAL=self.branch is not None,
            BLOCK_WIDTH=next_power_of_2(width),
        )

"""The norm and the packed QKV projection that open a layer.

    residual = x, or d(x + rms_norm(branch, branch_norm))       the previous MLP is added here in Gemma 2 and 3
    out      = d(rms_norm(residual, norm_weight) @ weight^T)    products accumulated in fp32, rounded once

d is the model's dtype. q/k norm, rotary embedding and the cache write belong to decode_attention, where whole heads are
at hand. Bytes moved: the weight, [(heads + 2 * kv_heads) * head_dim, hidden], once; the rest is a few KB.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from runtime.kernels.block import Block
from runtime.kernels.checks import check, check_residual, check_rows, check_weight
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.linear import linear_torch
from runtime.kernels.matvec import dot_products, groups_of, row_scales, summed_products, weight_pieces
from runtime.kernels.operation import NumbaCall, Operation
from runtime.kernels.pieces import norm_pieces
from runtime.kernels.products import launch_product
from runtime.kernels.quantized import Matrix, QuantizedMatrix
from runtime.kernels.rms_norm import normed_pieces, residual_pieces, residual_torch, rms_norm_torch
from runtime.kernels.triton_function import jit, tl


def qkv_projection_torch(op: QkvProjection) -> None:
    """One product per row, so that a row's sums do not depend on its neighbours, and one each for q, k and v: where
    a width is not a multiple of the CPU's vector width, a packed product differs from Hugging Face's three in the last
    bit."""
    residual = residual_torch(op.x, op.branch, op.branch_norm, op.eps)
    if op.residual_out is not None:
        op.residual_out.copy_(residual)
    normed = rms_norm_torch(residual, op.norm_weight, op.eps)
    weights = op.weight.split(op.widths or len(op.weight))
    for row in range(len(normed)):
        products = [linear_torch(normed[row : row + 1], weight) for weight in weights]
        torch.cat(products, dim=1, out=op.out[row : row + 1])


@jit(do_not_specialize=["rows"])
def qkv_projection_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    scale_ptr,
    branch_ptr,
    branch_norm_ptr,
    rows,
    eps,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    IS_ONE_ROW: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program holds BLOCK_OUTPUTS whole weight rows in registers and multiplies every row of x by them.
    program = tl.program_id(0)
    outputs = program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    GROUPS: tl.constexpr = groups_of(weight_ptr.dtype.element_ty)
    weight = weight_pieces(weight_ptr, outputs, outputs < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS)
    scales = row_scales(scale_ptr, outputs, outputs < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS)
    norm_weight = norm_pieces(norm_weight_ptr, WIDTH, BLOCK_WIDTH, GROUPS)
    branch_norm = norm_weight
    if HAS_BRANCH:
        branch_norm = norm_pieces(branch_norm_ptr, WIDTH, BLOCK_WIDTH, GROUPS)
    limit = tl.where(program == 0, WIDTH, 0)  # one program keeps the new residual for later kernels
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    # Only now: decode_attention reads the position and the cache before its own wait.
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    for row in range(1 if IS_ONE_ROW else rows):
        x = residual_pieces(
            residual_out_ptr,
            x_ptr,
            branch_ptr,
            branch_norm,
            row,
            limit,
            eps,
            WIDTH,
            BLOCK_WIDTH,
            HAS_BRANCH,
            HAS_BRANCH,
            GROUPS=GROUPS,
        )
        y = summed_products(weight, scales, normed_pieces(x, norm_weight, eps, WIDTH, dtype), False)  # [BLOCK_OUTPUTS]
        tl.store(out_ptr + row * OUTPUTS + outputs, y.to(dtype), mask=outputs < OUTPUTS)


@jit(do_not_specialize=["rows"])
def qkv_projection_dot_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    scale_ptr,
    branch_ptr,
    branch_norm_ptr,
    rows,
    eps,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    IS_HELD: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    N: tl.constexpr,
):
    # One program multiplies all rows, padded to N, by BLOCK_OUTPUTS weight rows.
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    y = dot_products(
        weight_ptr,
        scale_ptr,
        tl.minimum(outputs, OUTPUTS - 1),
        residual_out_ptr,
        x_ptr,
        norm_weight_ptr,
        branch_ptr,
        branch_norm_ptr,
        rows,
        eps,
        WIDTH,
        True,
        HAS_BRANCH,
        HAS_BRANCH,
        "after the wait",  # decode_attention reads the position and the cache before its own wait
        USE_DEPENDENT_LAUNCH,
        IS_HELD,
        BLOCK_WIDTH,
        SLICES,
        STAGES,
        N,
    )  # [BLOCK_OUTPUTS, N]
    n = tl.arange(0, N)
    at = out_ptr + n[None, :] * OUTPUTS + outputs[:, None]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(outputs < OUTPUTS)[:, None] & (n < rows)[None, :])


@dataclass(frozen=True, eq=False, repr=False)
class QkvProjection(Operation):
    """Projects the normalised residual to queries, keys and values.

    Args:
        out: [rows, outputs], written; outputs = (heads + 2 * kv_heads) * head_dim.
        x: [rows, hidden], the residual, 1 to 64 rows.
        norm_weight: [hidden], the norm before attention (multiplier 1 + weight).
        weight: [outputs, hidden]: all q rows, then k, then v.
        residual_out: [rows, hidden], written: the residual with the branch; given with `branch`, not x itself.
        branch: [rows, hidden], the previous branch's output, which is added to the residual here; or None.
        branch_norm: [hidden], the norm after that branch; given with `branch`.
        widths: how many rows of the weight are q, k and v: plain PyTorch multiplies each on its own. None for one
            product.
        eps: of every norm here.
        block: the form of the product and its block, None for this GPU's table; Triton only.
        normed: a workspace of the shape of x, which a looped product needs.
    """

    name = "qkv_projection"

    out: torch.Tensor
    x: torch.Tensor
    norm_weight: torch.Tensor
    weight: Matrix
    _: KW_ONLY
    residual_out: torch.Tensor | None = None
    branch: torch.Tensor | None = None
    branch_norm: torch.Tensor | None = None
    widths: tuple[int, ...] | None = None
    eps: float
    block: Block | None = None
    normed: torch.Tensor | None = None

    def check(self) -> None:
        rows, hidden = check_rows("x", self.x)
        check("norm_weight", self.norm_weight, (hidden,), self.x.dtype, self.x.device)
        outputs = check_weight("weight", self.weight, hidden, self.x)
        check("out", self.out, (rows, outputs), self.x.dtype, self.x.device)
        check_residual(self.x, self.branch, self.branch_norm, self.residual_out)

    def run_torch(self) -> None:
        qkv_projection_torch(self)

    def run_numba(self, call: NumbaCall) -> None:
        weights: list[Matrix] = [self.weight]
        if isinstance(self.weight, QuantizedMatrix):  # a compiled product reads one format
            weights = [QuantizedMatrix([part]) for part in self.weight.parts]
        weight, second, third = (*weights, None, None)[:3]
        call(self, weight=weight, second_weight=second, third_weight=third)

    def run_triton(self, launch: Launcher) -> None:
        launch_product(launch, self, qkv_projection_kernel, qkv_projection_dot_kernel, "weight", has_norm=True)

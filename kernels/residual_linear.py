"""The output projection of attention and the down projection of an MLP, with the residual add of Gemma 1.

    out = d(x @ weight^T)                   products accumulated in fp32, rounded once
    out = d(residual + d(x @ weight^T))     where there is a residual: two roundings, as in Hugging Face

d is the model's dtype. Gemma 2 and 3 normalise the branch before it is added, which needs the whole row: the next
kernel does that (its `branch`). A long row is summed in two phases within one launch: each warp sums its
share of the columns, then the shares are added in a fixed order. Bytes moved: the weight, [hidden, width], once.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from runtime.kernels.block import Block
from runtime.kernels.checks import check, check_rows, check_weight
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.linear import linear_torch
from runtime.kernels.matvec import dot_products, groups_of, row_scales, summed_products, weight_pieces
from runtime.kernels.operation import Operation
from runtime.kernels.pieces import row_pieces
from runtime.kernels.products import launch_product
from runtime.kernels.quantized import Matrix
from runtime.kernels.triton_function import jit, tl


def residual_linear_torch(out: torch.Tensor, x: torch.Tensor, weight: Matrix, residual: torch.Tensor | None) -> None:
    """One product per row, so that a row's sums do not depend on its neighbours."""
    for row in range(len(x)):
        product = linear_torch(x[row : row + 1], weight)[0]
        if residual is None:
            out[row] = product
        else:
            torch.add(residual[row], product, out=out[row])


@jit(do_not_specialize=["rows"])
def residual_linear_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    residual_ptr,
    rows,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_ONE_ROW: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program holds BLOCK_OUTPUTS whole weight rows in registers and multiplies every row of x by them.
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    GROUPS: tl.constexpr = groups_of(weight_ptr.dtype.element_ty)
    weight = weight_pieces(weight_ptr, outputs, outputs < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS)
    scales = row_scales(scale_ptr, outputs, outputs < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for row in range(1 if IS_ONE_ROW else rows):
        x = row_pieces(x_ptr + row * WIDTH, WIDTH, BLOCK_WIDTH, GROUPS)
        y = summed_products(weight, scales, x, True).to(dtype)  # [BLOCK_OUTPUTS]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row * OUTPUTS + outputs, mask=outputs < OUTPUTS, other=0.0)
            # The product was rounded before the add: two tensor operations in Hugging Face.
            y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
        tl.store(out_ptr + row * OUTPUTS + outputs, y, mask=outputs < OUTPUTS)


@jit(do_not_specialize=["rows"])
def residual_linear_dot_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    residual_ptr,
    rows,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
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
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    y = dot_products(
        weight_ptr,
        scale_ptr,
        tl.minimum(outputs, OUTPUTS - 1),
        x_ptr,
        x_ptr,
        x_ptr,
        x_ptr,
        x_ptr,
        rows,
        0.0,
        WIDTH,
        False,
        False,
        False,
        "at once",
        USE_DEPENDENT_LAUNCH,
        IS_HELD,
        BLOCK_WIDTH,
        SLICES,
        STAGES,
        N,
    ).to(dtype)  # [BLOCK_OUTPUTS, N]
    n = tl.arange(0, N)
    mask = (outputs < OUTPUTS)[:, None] & (n < rows)[None, :]
    at = n[None, :] * OUTPUTS + outputs[:, None]
    if HAS_RESIDUAL:
        # The product was rounded before the add: two tensor operations in Hugging Face.
        y = (tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32) + y.to(tl.float32)).to(dtype)
    tl.store(out_ptr + at, y, mask=mask)


@dataclass(frozen=True, eq=False, repr=False)
class ResidualLinear(Operation):
    """Projects x back to the width of the residual, and adds the residual if it is given.

    Args:
        out: [rows, hidden], written; may be `residual`.
        x: [rows, width], 1 to 64 rows.
        weight: [hidden, width].
        residual: [rows, hidden], or None.
        block: the form of the product and its block, None for this GPU's table; Triton only.
    """

    name = "residual_linear"

    out: torch.Tensor
    x: torch.Tensor
    weight: Matrix
    _: KW_ONLY
    residual: torch.Tensor | None = None
    block: Block | None = None

    def check(self) -> None:
        rows, width = check_rows("x", self.x)
        hidden = check_weight("weight", self.weight, width, self.x)
        check("out", self.out, (rows, hidden), self.x.dtype, self.x.device)
        if self.residual is not None:
            check("residual", self.residual, (rows, hidden), self.x.dtype, self.x.device)

    def run_torch(self) -> None:
        residual_linear_torch(self.out, self.x, self.weight, self.residual)

    def run_triton(self, launch: Launcher) -> None:
        launch_product(launch, self, residual_linear_kernel, residual_linear_dot_kernel, "weight", has_norm=False)

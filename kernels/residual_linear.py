"""The down projection that closes an MLP, with the residual add of Gemma 1.

    out = d(x @ weight^T)                   products accumulated in fp32, rounded once
    out = d(residual + d(x @ weight^T))     where there is a residual: two roundings, as in Hugging Face

d is the model's dtype. Gemma 2 and 3 normalise the branch before it joins the stream, which needs the whole row: the
next kernel does that (its `branch`). A long row is summed in two phases, without a second launch: each warp its own
share of the columns, then the shares in a fixed order. Bytes moved: the weight, [hidden, width], once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.block import Block, block_for
from runtime.kernels.checks import check, check_rows, check_weight
from runtime.kernels.cpu.calls import capture
from runtime.kernels.launch import held_packed, launch, let_next_kernel_start, use_kernel, wait_for_previous_kernel
from runtime.kernels.linear_reference import linear_reference


def residual_linear_reference(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, residual: torch.Tensor | None = None
) -> None:
    """One product per row, so that a row's sums do not depend on its neighbours."""
    for row in range(len(x)):
        product = linear_reference(x[row : row + 1], weight)[0]
        if residual is None:
            out[row] = product
        else:
            torch.add(residual[row], product, out=out[row])


@triton.jit(do_not_specialize=["rows"])
def residual_linear_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    rows,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program holds BLOCK_OUTPUTS whole weight rows in registers and takes every row of x past them.
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    columns = tl.arange(0, BLOCK_WIDTH)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    weight = tl.load(
        weight_ptr + outputs.to(tl.int64)[:, None] * WIDTH + columns[None, :],
        mask=(outputs < OUTPUTS)[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )  # [BLOCK_OUTPUTS, BLOCK_WIDTH]
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for row in range(rows):
        x = tl.load(x_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        y = tl.sum(held_packed(weight).to(tl.float32) * x[None, :], axis=1).to(dtype)  # [BLOCK_OUTPUTS]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row * OUTPUTS + outputs, mask=outputs < OUTPUTS, other=0.0)
            # The product was rounded before the add: two tensor operations in Hugging Face.
            y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
        tl.store(out_ptr + row * OUTPUTS + outputs, y, mask=outputs < OUTPUTS)


def residual_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    block: Block | None = None,
) -> None:
    """Projects x back to the width of the residual stream and adds the residual if one is given.

    Args:
        out: [rows, hidden], written; may be `residual`.
        x: [rows, width], 1 to 8 rows.
        weight: [hidden, width].
        residual: [rows, hidden], or None.
        block: how the kernel is cut, None for this GPU's table; unused by the reference.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    rows, width = check_rows("x", x)
    hidden = check_weight("weight", weight, width, x)
    check("out", out, (rows, hidden), x.dtype, x.device)
    if residual is not None:
        check("residual", residual, (rows, hidden), x.dtype, x.device)
    if use_kernel(x):
        block = block or block_for("residual_linear", hidden, width, x)
        launch(
            residual_linear_kernel,
            (triton.cdiv(hidden, block.rows),),
            x.device,
            block.warps,
            out,
            x,
            weight,
            residual,
            rows,
            OUTPUTS=hidden,
            WIDTH=width,
            HAS_RESIDUAL=residual is not None,
            BLOCK_OUTPUTS=block.rows,
            BLOCK_WIDTH=block.columns,
        )
        return
    if capture("residual_linear", out, x, weight, residual):
        return
    residual_linear_reference(out, x, weight, residual=residual)

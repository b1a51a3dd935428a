"""The norm and the packed QKV projection that open a layer.

    stream = x, or d(x + rms_norm(branch, branch_norm))     the previous MLP joins here in Gemma 2 and 3
    out    = d(rms_norm(stream, norm_weight) @ weight^T)    products accumulated in fp32, rounded once

d is the model's dtype. q/k norm, rotary embedding and the cache write belong to decode_attention, where whole heads are
at hand. Bytes moved: the weight, [(heads + 2 * kv_heads) * head_dim, hidden], once; the rest is a few KB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.block import Block, block_for
from runtime.kernels.checks import check, check_rows, check_stream, check_weight
from runtime.kernels.cpu.calls import capture
from runtime.kernels.launch import launch, let_next_kernel_start, use_kernel, wait_for_previous_kernel
from runtime.kernels.linear_reference import linear_reference
from runtime.kernels.rms_norm import normed_row, rms_norm_reference, stream_reference, stream_row


def qkv_projection_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    splits: tuple[int, ...] | None = None,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    x_out: torch.Tensor | None = None,
) -> None:
    """One product per row, so that a row's sums do not depend on its neighbours, and one per part: with widths that are
    no multiple of the vector's, a packed product on a CPU differs from Hugging Face's three in the last bit."""
    stream = stream_reference(x, branch, branch_norm, eps)
    if x_out is not None:
        x_out.copy_(stream)
    normed = rms_norm_reference(stream, norm_weight, eps)
    for row in range(len(x)):
        parts = [linear_reference(normed[row : row + 1], part) for part in weight.split(splits or len(weight))]
        torch.cat(parts, dim=1, out=out[row : row + 1])


@triton.jit(do_not_specialize=["rows"])
def qkv_projection_kernel(
    out_ptr,
    x_out_ptr,
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    branch_ptr,
    branch_norm_ptr,
    rows,
    eps,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program holds BLOCK_OUTPUTS whole weight rows in registers and takes every row of x past them.
    program = tl.program_id(0)
    outputs = program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    columns = tl.arange(0, BLOCK_WIDTH)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    weight = tl.load(
        weight_ptr + outputs.to(tl.int64)[:, None] * WIDTH + columns[None, :],
        mask=(outputs < OUTPUTS)[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )  # [BLOCK_OUTPUTS, BLOCK_WIDTH]
    norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    branch_norm = norm_weight
    if HAS_BRANCH:
        branch_norm = tl.load(branch_norm_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    stored = tl.where(program == 0, WIDTH, 0)  # one program keeps the new stream for later kernels
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    # Only now: decode_attention reads the position and the cache before its own wait.
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    for row in range(rows):
        x = stream_row(
            x_out_ptr, x_ptr, branch_ptr, branch_norm, row, columns, stored, eps, WIDTH, HAS_BRANCH, HAS_BRANCH
        )
        x = normed_row(x, norm_weight, eps, WIDTH, dtype)
        y = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)  # [BLOCK_OUTPUTS]
        tl.store(out_ptr + row * OUTPUTS + outputs, y.to(dtype), mask=outputs < OUTPUTS)


def qkv_projection(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    splits: tuple[int, ...] | None = None,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    x_out: torch.Tensor | None = None,
    block: Block | None = None,
) -> None:
    """Projects the normalised residual stream to queries, keys and values.

    Args:
        out: [rows, outputs], written; outputs = (heads + 2 * kv_heads) * head_dim.
        x: [rows, hidden], the residual stream, 1 to 8 rows.
        norm_weight: [hidden], the norm before attention (multiplier 1 + weight).
        weight: [outputs, hidden]: all q rows, then k, then v.
        eps: of every norm here.
        splits: how many rows of the weight are q, k and v; the reference multiplies each part on its own. None for one
            product.
        branch: [rows, hidden], the previous branch's output, joining the stream here; or None.
        branch_norm: [hidden], the norm after that branch; given with `branch`.
        x_out: [rows, hidden], written: the new stream; given with `branch`, and another buffer than x.
        block: how the kernel is cut, None for this GPU's table; unused by the reference.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    rows, hidden = check_rows("x", x)
    check("norm_weight", norm_weight, (hidden,), x.dtype, x.device)
    outputs = check_weight("weight", weight, hidden, x)
    check("out", out, (rows, outputs), x.dtype, x.device)
    check_stream(x, branch, branch_norm, x_out)
    if use_kernel(x):
        block = block or block_for("qkv_projection", outputs, hidden, x)
        launch(
            qkv_projection_kernel,
            (triton.cdiv(outputs, block.rows),),
            x.device,
            block.warps,
            out,
            x_out,
            x,
            norm_weight,
            weight,
            branch,
            branch_norm,
            rows,
            eps,
            OUTPUTS=outputs,
            WIDTH=hidden,
            HAS_BRANCH=branch is not None,
            BLOCK_OUTPUTS=block.rows,
            BLOCK_WIDTH=block.columns,
        )
        return
    if capture("qkv_projection", out, x_out, x, norm_weight, weight, branch, branch_norm, eps):
        return
    qkv_projection_reference(
        out,
        x,
        norm_weight,
        weight,
        eps=eps,
        splits=splits,
        branch=branch,
        branch_norm=branch_norm,
        x_out=x_out,
    )

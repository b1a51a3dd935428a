"""The norm, the gate and up projections and their product that open an MLP.

    stream = x, or d(x + rms_norm(branch, branch_norm))     attention joins here in Gemma 2 and 3
    normed = rms_norm(stream, norm_weight)
    gate   = d(normed @ gate_weight^T)      up = d(normed @ up_weight^T)
    out    = d(d(gelu_tanh(gate)) * up)     GELU in fp32, each arrow to d a rounding of Hugging Face's

d is the model's dtype. Bytes moved: gate_up, [2 * intermediate, hidden], once: half of all that a layer reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from runtime.kernels.block import Block, block_for
from runtime.kernels.checks import check, check_rows, check_stream, check_weight
from runtime.kernels.cpu.calls import capture
from runtime.kernels.launch import launch, let_next_kernel_start, use_kernel, wait_for_previous_kernel
from runtime.kernels.linear_reference import linear_reference
from runtime.kernels.rms_norm import normed_row, rms_norm_reference, stream_reference, stream_row


def gated_mlp_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    eps: float,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    x_out: torch.Tensor | None = None,
) -> None:
    """One gate and one up product per row, so that a row's sums do not depend on its neighbours."""
    stream = stream_reference(x, branch, branch_norm, eps)
    if x_out is not None:
        x_out.copy_(stream)
    normed = rms_norm_reference(stream, norm_weight, eps)
    gate_weight, up_weight = gate_up.chunk(2)
    for row in range(len(x)):
        gate = linear_reference(normed[row : row + 1], gate_weight)
        up = linear_reference(normed[row : row + 1], up_weight)
        torch.mul(F.gelu(gate, approximate="tanh"), up, out=out[row : row + 1])


@triton.jit
def gelu_tanh(x):
    """x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), written as x * sigmoid(2u): exact for large
    negative x too, where 1 + tanh(u) cancels."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@triton.jit(do_not_specialize=["rows"])
def gated_mlp_kernel(
    out_ptr,
    x_out_ptr,
    x_ptr,
    norm_weight_ptr,
    gate_up_ptr,
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
    # One program holds BLOCK_OUTPUTS gate rows and the matching up rows, and takes every row of x past them.
    program = tl.program_id(0)
    outputs = program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    columns = tl.arange(0, BLOCK_WIDTH)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    offsets = outputs.to(tl.int64)[:, None] * WIDTH + columns[None, :]  # [BLOCK_OUTPUTS, BLOCK_WIDTH]
    mask = (outputs < OUTPUTS)[:, None] & (columns < WIDTH)[None, :]
    gate_weight = tl.load(gate_up_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    up_ptr = gate_up_ptr + OUTPUTS * WIDTH
    up_weight = tl.load(up_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    branch_norm = norm_weight
    if HAS_BRANCH:
        branch_norm = tl.load(branch_norm_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    stored = tl.where(program == 0, WIDTH, 0)  # one program keeps the new stream for later kernels
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for row in range(rows):
        x = stream_row(
            x_out_ptr, x_ptr, branch_ptr, branch_norm, row, columns, stored, eps, WIDTH, HAS_BRANCH, HAS_BRANCH
        )
        x = normed_row(x, norm_weight, eps, WIDTH, dtype)
        gate = tl.sum(gate_weight.to(tl.float32) * x[None, :], axis=1)  # [BLOCK_OUTPUTS]
        up = tl.sum(up_weight.to(tl.float32) * x[None, :], axis=1)
        # Both products and the activation are tensors of the model's dtype in Hugging Face.
        gate = gate.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
        activated = gelu_tanh(gate).to(dtype).to(tl.float32)
        tl.store(out_ptr + row * OUTPUTS + outputs, (activated * up).to(dtype), mask=outputs < OUTPUTS)


def gated_mlp(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    eps: float,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    x_out: torch.Tensor | None = None,
    block: Block | None = None,
) -> None:
    """Computes the activations between an MLP's two halves.

    Args:
        out: [rows, intermediate], written.
        x: [rows, hidden], the residual stream, 1 to 8 rows.
        norm_weight: [hidden], the norm before the MLP (multiplier 1 + weight).
        gate_up: [2 * intermediate, hidden]: all gate rows, then up.
        eps: of every norm here.
        branch: [rows, hidden], the attention's output, joining the stream here; or None.
        branch_norm: [hidden], the norm after attention; given with `branch`.
        x_out: [rows, hidden], written: the new stream; given with `branch`, and another buffer than x.
        block: how the kernel is cut, None for this GPU's table; unused by the reference.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    rows, hidden = check_rows("x", x)
    check("norm_weight", norm_weight, (hidden,), x.dtype, x.device)
    outputs = check_weight("gate_up", gate_up, hidden, x)
    if outputs % 2:
        raise ValueError(f"gate_up: expected an even number of outputs (gate, then up), got {outputs}")
    check("out", out, (rows, outputs // 2), x.dtype, x.device)
    check_stream(x, branch, branch_norm, x_out)
    if use_kernel(x):
        block = block or block_for("gated_mlp", outputs // 2, hidden, x, 2)
        launch(
            gated_mlp_kernel,
            (triton.cdiv(outputs // 2, block.rows),),
            x.device,
            block.warps,
            out,
            x_out,
            x,
            norm_weight,
            gate_up,
            branch,
            branch_norm,
            rows,
            eps,
            OUTPUTS=outputs // 2,
            WIDTH=hidden,
            HAS_BRANCH=branch is not None,
            BLOCK_OUTPUTS=block.rows,
            BLOCK_WIDTH=block.columns,
        )
        return
    if capture("gated_mlp", out, x_out, x, norm_weight, gate_up, branch, branch_norm, eps):
        return
    gated_mlp_reference(out, x, norm_weight, gate_up, eps=eps, branch=branch, branch_norm=branch_norm, x_out=x_out)

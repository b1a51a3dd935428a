"""The norm, the gate and up projections and their product that open an MLP.

    residual = x, or d(x + rms_norm(branch, branch_norm))   attention is added here in Gemma 2 and 3
    normed   = rms_norm(residual, norm_weight)
    gate     = d(normed @ gate_weight^T)    up = d(normed @ up_weight^T)
    out      = d(d(gelu_tanh(gate)) * up)   GELU in fp32; each d(...) is a rounding of Hugging Face's

d is the model's dtype. Bytes moved: gate_up, [2 * intermediate, hidden], once: half of all that a layer reads.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F

from runtime.kernels.block import Block
from runtime.kernels.checks import check, check_residual, check_rows, check_weight
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.linear import linear_torch
from runtime.kernels.matvec import dot_products, groups_of, row_scales, summed_products, weight_pieces
from runtime.kernels.operation import NumbaCall, Operation
from runtime.kernels.pieces import norm_pieces
from runtime.kernels.products import launch_product
from runtime.kernels.quantized import Matrix
from runtime.kernels.rms_norm import normed_pieces, residual_pieces, residual_torch, rms_norm_torch
from runtime.kernels.triton_function import jit, tl


def gated_mlp_torch(op: GatedMlp) -> None:
    """One gate and one up product per row, so that a row's sums do not depend on its neighbours."""
    residual = residual_torch(op.x, op.branch, op.branch_norm, op.eps)
    if op.residual_out is not None:
        op.residual_out.copy_(residual)
    normed = rms_norm_torch(residual, op.norm_weight, op.eps)
    gate_weight, up_weight = op.gate_up.split(len(op.gate_up) // 2)
    for row in range(len(normed)):
        gate = linear_torch(normed[row : row + 1], gate_weight)
        up = linear_torch(normed[row : row + 1], up_weight)
        torch.mul(F.gelu(gate, approximate="tanh"), up, out=op.out[row : row + 1])


@jit
def gelu_tanh(x):
    """x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), written as x * sigmoid(2u): exact for large
    negative x too, where 1 + tanh(u) cancels."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@jit
def gated(gate, up, dtype: tl.constexpr):
    """gelu_tanh(gate) * up: gate, up and the activation are each a tensor of the model's dtype in Hugging Face."""
    activated = gelu_tanh(gate.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return (activated * up.to(dtype).to(tl.float32)).to(dtype)


@jit(do_not_specialize=["rows"])
def gated_mlp_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    gate_up_ptr,
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
    # One program holds BLOCK_OUTPUTS gate rows and the matching up rows, and multiplies every row of x by them.
    program = tl.program_id(0)
    outputs = program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    GROUPS: tl.constexpr = groups_of(gate_up_ptr.dtype.element_ty)
    gate_weight = weight_pieces(gate_up_ptr, outputs, outputs < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS)
    up_weight = weight_pieces(
        gate_up_ptr + OUTPUTS * (WIDTH // GROUPS), outputs, outputs < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS
    )
    gate_scales = row_scales(scale_ptr, outputs, outputs < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS)
    up_scales = row_scales(scale_ptr, OUTPUTS + outputs, outputs < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS)
    norm_weight = norm_pieces(norm_weight_ptr, WIDTH, BLOCK_WIDTH, GROUPS)
    branch_norm = norm_weight
    if HAS_BRANCH:
        branch_norm = norm_pieces(branch_norm_ptr, WIDTH, BLOCK_WIDTH, GROUPS)
    limit = tl.where(program == 0, WIDTH, 0)  # one program keeps the new residual for later kernels
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
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
        x = normed_pieces(x, norm_weight, eps, WIDTH, dtype)
        gate = summed_products(gate_weight, gate_scales, x, False)
        y = gated(gate, summed_products(up_weight, up_scales, x, False), dtype)
        tl.store(out_ptr + row * OUTPUTS + outputs, y, mask=outputs < OUTPUTS)


@jit(do_not_specialize=["rows"])
def gated_mlp_dot_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    gate_up_ptr,
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
    # One program multiplies all rows, padded to N, by half a tile of gate rows and the matching up rows.
    HALF: tl.constexpr = BLOCK_OUTPUTS // 2
    first = tl.program_id(0) * HALF
    i = tl.arange(0, BLOCK_OUTPUTS)
    # Started at once, programs of the down projection, about one a multiprocessor, would crowd onto those where the
    # first programs of this kernel have ended while others still run. Measured, that costs time with integers, and none
    # with 16-bit weights.
    STARTS_NEXT: tl.constexpr = "at once" if scale_ptr is None else "at the end"
    y = dot_products(
        gate_up_ptr,
        scale_ptr,
        tl.minimum(first + i % HALF, OUTPUTS - 1) + (i // HALF) * OUTPUTS,
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
        STARTS_NEXT,
        USE_DEPENDENT_LAUNCH,
        IS_HELD,
        BLOCK_WIDTH,
        SLICES,
        STAGES,
        N,
    )  # [BLOCK_OUTPUTS, N]
    gate, up = tl.split(tl.permute(tl.reshape(y, (2, HALF, N)), (1, 2, 0)))
    outputs, n = first + tl.arange(0, HALF), tl.arange(0, N)
    at = out_ptr + n[None, :] * OUTPUTS + outputs[:, None]
    mask = (outputs < OUTPUTS)[:, None] & (n < rows)[None, :]
    tl.store(at, gated(gate, up, out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, eq=False, repr=False)
class GatedMlp(Operation):
    """Computes the input of an MLP's down projection.

    Args:
        out: [rows, intermediate], written.
        x: [rows, hidden], the residual, 1 to 64 rows.
        norm_weight: [hidden], the norm before the MLP (multiplier 1 + weight).
        gate_up: [2 * intermediate, hidden]: all gate rows, then up.
        residual_out: [rows, hidden], written: the residual with the branch; given with `branch`, not x itself.
        branch: [rows, hidden], the attention's output, which is added to the residual here; or None.
        branch_norm: [hidden], the norm after attention; given with `branch`.
        eps: of every norm here.
        block: the form of the product and its block, None for this GPU's table; Triton only.
        normed: a workspace of the shape of x, which a looped product needs.
    """

    name = "gated_mlp"

    out: torch.Tensor
    x: torch.Tensor
    norm_weight: torch.Tensor
    gate_up: Matrix
    _: KW_ONLY
    residual_out: torch.Tensor | None = None
    branch: torch.Tensor | None = None
    branch_norm: torch.Tensor | None = None
    eps: float
    block: Block | None = None
    normed: torch.Tensor | None = None

    def check(self) -> None:
        rows, hidden = check_rows("x", self.x)
        check("norm_weight", self.norm_weight, (hidden,), self.x.dtype, self.x.device)
        outputs = check_weight("gate_up", self.gate_up, hidden, self.x)
        if outputs % 2:
            raise ValueError(f"gate_up: expected an even number of outputs (gate, then up), got {outputs}")
        check("out", self.out, (rows, outputs // 2), self.x.dtype, self.x.device)
        check_residual(self.x, self.branch, self.branch_norm, self.residual_out)

    def run_torch(self) -> None:
        gated_mlp_torch(self)

    def run_numba(self, call: NumbaCall) -> None:
        gate, up = self.gate_up.split(len(self.gate_up) // 2)
        call(self, gate_weight=gate, up_weight=up)

    def run_triton(self, launch: Launcher) -> None:
        launch_product(launch, self, gated_mlp_kernel, gated_mlp_dot_kernel, "gate_up", has_norm=True, matrices=2)

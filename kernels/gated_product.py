"""The activated product in an MLP, from gate and up projections that a library has computed.

    out = d(d(gelu_tanh(gate)) * up)    GELU in fp32; each d(...) is a rounding of Hugging Face's

d is the model's dtype. Bytes moved: 3 * intermediate * sizeof(d) per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.kernels.checks import MAX_TOKENS, check, check_rows
from runtime.kernels.gated_mlp import gated
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import Operation
from runtime.kernels.triton_function import cdiv, jit, next_power_of_2, tl

BLOCK_WIDTH, WARPS = 1024, 4  # columns of one program


@jit
def gated_product_kernel(
    out_ptr, gate_up_ptr, WIDTH: tl.constexpr, USE_DEPENDENT_LAUNCH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    # One program makes BLOCK_WIDTH columns of one token.
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    mask = columns < WIDTH
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    gate_at = gate_up_ptr + token * (2 * WIDTH) + columns
    gate = tl.load(gate_at, mask=mask, other=0.0)
    up = tl.load(gate_at + WIDTH, mask=mask, other=0.0)
    tl.store(out_ptr + token * WIDTH + columns, gated(gate, up, out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, eq=False, repr=False)
class GatedProduct(Operation):
    """Multiplies activated gates and ups.

    Args:
        out: [seq, intermediate], written.
        gate_up: [seq, 2 * intermediate]: a token's gates, then its ups.
    """

    name = "gated_product"

    out: torch.Tensor
    gate_up: torch.Tensor

    def check(self) -> None:
        seq, columns = check_rows("gate_up", self.gate_up, MAX_TOKENS)
        if columns % 2:
            raise ValueError(f"gate_up: expected an even number of columns (gate, then up), got {columns}")
        check("out", self.out, (seq, columns // 2), self.gate_up.dtype, self.gate_up.device)

    def run_torch(self) -> None:
        gate, up = self.gate_up.chunk(2, dim=1)
        torch.mul(F.gelu(gate, approximate="tanh"), up, out=self.out)

    def run_triton(self, launch: Launcher) -> None:
        seq, width = self.out.shape
        launch(
            gated_product_kernel,
            self,
            (seq, cdiv(width, BLOCK_WIDTH)),
            WARPS,
            WIDTH=width,
            BLOCK_WIDTH=min(BLOCK_WIDTH, next_power_of_2(width)),
        )

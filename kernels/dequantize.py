"""The values of a matrix of integers with scales, for a library's product with a chunk of a prompt.

    out = d(scale * q)      int8, in fp32
    out = d(d' * (q - 8))   int4, in fp32, which holds it exactly

d is the dtype of what they are multiplied by. Bytes moved: the integers and their scales, and a value for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.kernels.checks import check
from runtime.kernels.integers import row_of_words
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import Operation
from runtime.kernels.scaled_matrix import ScaledMatrix

BLOCK_WIDTH, WARPS = 1024, 4  # columns of one program


@triton.jit
def dequantize_kernel(
    out_ptr, q_ptr, scale_ptr, WIDTH: tl.constexpr, USE_DEPENDENT_LAUNCH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    # One program makes BLOCK_WIDTH columns of one row.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    mask = columns < WIDTH
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    if q_ptr.dtype.element_ty == tl.int16:
        values = row_of_words(q_ptr, scale_ptr, row, columns, WIDTH)
    else:
        values = tl.load(q_ptr + row * WIDTH + columns, mask=mask, other=0).to(tl.float32) * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * WIDTH + columns, values.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, eq=False, repr=False)
class Dequantize(Operation):
    """Writes out a matrix.

    Args:
        out: [outputs, columns], written; fp32, bf16 or fp16.
        matrix: [outputs, columns].
    """

    name = "dequantize"

    out: torch.Tensor
    matrix: ScaledMatrix

    def check(self) -> None:
        if not isinstance(self.matrix, ScaledMatrix):
            raise TypeError(f"matrix: expected a ScaledMatrix, got {type(self.matrix).__name__}")
        check("out", self.out, tuple(self.matrix.shape), self.out.dtype, self.matrix.device)

    def run_torch(self) -> None:
        self.out.copy_(self.matrix.dequantized(torch.promote_types(self.out.dtype, torch.float32)))

    def run_triton(self, launch: Launcher) -> None:
        outputs, width = self.out.shape
        launch(
            dequantize_kernel,
            self,
            (outputs, triton.cdiv(width, BLOCK_WIDTH)),
            WARPS,
            q_ptr=self.matrix.q,
            scale_ptr=self.matrix.scale,
            WIDTH=width,
            BLOCK_WIDTH=min(BLOCK_WIDTH, triton.next_power_of_2(width)),
        )

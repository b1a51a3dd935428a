"""The values of a matrix of integers with scales, for a library's product with a chunk of a prompt.

    out = d(scale * q)      int8, in fp32
    out = d(d' * (q - 8))   int4, in fp32, which holds it exactly

d is the dtype of the activations that they are multiplied by. Bytes moved: the integers and their scales, and a value
for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kernels.checks import check
from runtime.kernels.integers import row_of_words
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.linear import wide_dtype
from runtime.kernels.operation import Operation
from runtime.kernels.scaled_matrix import ScaledMatrix
from runtime.kernels.triton_function import cdiv, jit, next_power_of_2, tl

BLOCK_ROWS, BLOCK_WIDTH, WARPS = 4, 1024, 4  # rows and columns of one program


@jit
def dequantize_kernel(
    out_ptr,
    q_ptr,
    scale_ptr,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program makes BLOCK_WIDTH columns of BLOCK_ROWS rows.
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH))[None, :]
    at = tl.minimum(rows, OUTPUTS - 1)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    if q_ptr.dtype.element_ty == tl.int16:
        values = row_of_words(q_ptr, scale_ptr, at, columns, WIDTH)
    else:
        q = tl.load(q_ptr + at * WIDTH + columns, mask=columns < WIDTH, other=0)
        values = q.to(tl.float32) * tl.load(scale_ptr + at)
    is_there = (rows < OUTPUTS) & (columns < WIDTH)
    tl.store(out_ptr + rows * WIDTH + columns, values.to(out_ptr.dtype.element_ty), mask=is_there)


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
        self.out.copy_(self.matrix.dequantized(wide_dtype(self.out)))

    def run_triton(self, launch: Launcher) -> None:
        outputs, width = self.out.shape
        launch(
            dequantize_kernel,
            self,
            (cdiv(outputs, BLOCK_ROWS), cdiv(width, BLOCK_WIDTH)),
            WARPS,
            q_ptr=self.matrix.q,
            scale_ptr=self.matrix.scale,
            OUTPUTS=outputs,
            WIDTH=width,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_WIDTH=min(BLOCK_WIDTH, next_power_of_2(width)),
        )

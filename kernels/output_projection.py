"""Combines the attention's splits and projects the result, with the residual add of Gemma 1.

    x   = the attention's output, combined from its splits and rounded to d (attention_splits.py)
    out = d(x @ weight^T)                   products accumulated in fp32, rounded once
    out = d(residual + d(x @ weight^T))     where there is a residual: two roundings, as in Hugging Face

d is the model's dtype. Gemma 2 and 3 normalise the branch before it is added, which needs the whole row: the next
kernel does that (its `branch`). Bytes moved: the weight, [hidden, heads * head_dim], once; the splits,
4 * heads * head_dim * splits, which every program reads from the L2 cache: programs are few.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass

import torch
import triton
import triton.language as tl

from runtime.kernels.attention_splits import (
    ALL_KEYS,
    MAX_SPLITS,
    SPLITS_AT_ONCE,
    AttentionSplits,
    block_keys,
    check_splits,
    combine_torch,
    combined_row,
    planned_splits,
)
from runtime.kernels.block import Block, listed_block, warps_for
from runtime.kernels.checks import MAX_ROWS, check, check_rows
from runtime.kernels.launch import Gpu, Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.matvec import held_packed, matvec
from runtime.kernels.operation import NumbaCall, Operation
from runtime.kernels.residual_linear import residual_linear_torch


def output_projection_torch(op: OutputProjection) -> None:
    """The combined row, rounded, and its projection as in residual_linear."""
    combined = combine_torch(op.attention, op.position, op.window, block_keys(op.out.dtype))
    residual_linear_torch(op.out, combined.to(op.out.dtype), op.weight, op.residual)


@triton.jit(do_not_specialize=["rows", "window"])
def output_projection_kernel(
    out_ptr,
    partial_ptr,
    stats_ptr,
    position_ptr,
    weight_ptr,
    residual_ptr,
    rows,
    window,
    OUTPUTS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PROGRAM_OUTPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # One program holds PROGRAM_OUTPUTS whole weight rows in registers and multiplies every combined row by them.
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    lane = tl.arange(0, BLOCK_OUTPUTS)
    outputs = tl.program_id(0) * PROGRAM_OUTPUTS + lane
    outputs_mask = (lane < PROGRAM_OUTPUTS) & (outputs < OUTPUTS)
    # Columns are padded head by head, so that the combined heads are a row of them.
    BLOCK_WIDTH: tl.constexpr = BLOCK_HEADS * BLOCK_DIM
    head = tl.arange(0, BLOCK_WIDTH) // BLOCK_DIM
    dim = tl.arange(0, BLOCK_WIDTH) % BLOCK_DIM
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    weight = tl.load(
        weight_ptr + outputs.to(tl.int64)[:, None] * WIDTH + (head * HEAD_DIM + dim)[None, :],
        mask=outputs_mask[:, None] & ((head < HEADS) & (dim < HEAD_DIM))[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )  # [BLOCK_OUTPUTS, BLOCK_WIDTH]
    # Before the wait: the positions, which nothing before the end of the step changes.
    every_row = tl.arange(0, MAX_ROWS)
    positions = tl.load(position_ptr + every_row, mask=every_row < rows, other=0)
    length, size, row_splits = planned_splits(positions, window, MAX_SPLITS, BLOCK_KEYS)  # [MAX_ROWS]
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for row in range(rows):
        splits = tl.max(tl.where(every_row == row, row_splits, 0), axis=0)
        x = combined_row(
            partial_ptr, stats_ptr, row, splits, HEADS, HEAD_DIM, MAX_SPLITS, SPLITS_AT_ONCE, BLOCK_HEADS, BLOCK_DIM
        )
        # The attention's output is a tensor of the model's dtype in Hugging Face.
        x = x.to(dtype).to(tl.float32).reshape(BLOCK_WIDTH)
        y = matvec(held_packed(weight), x).to(dtype)  # [BLOCK_OUTPUTS]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row * OUTPUTS + outputs, mask=outputs_mask, other=0.0)
            # The product was rounded before the add: two tensor operations in Hugging Face.
            y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
        tl.store(out_ptr + row * OUTPUTS + outputs, y, mask=outputs_mask)


@functools.cache
def output_block(outputs: int, width: int, dtype: torch.dtype, gpu: Gpu | None) -> Block:
    """The block of a shape: the GPU's table's, else 8 or 6 rows a program (of 4 bytes an element, half as many),
    whichever spreads more evenly over the GPU. Fewer rows would mean more programs, each reading all the splits."""
    listed = listed_block("output_projection", outputs, width, dtype, gpu)
    if listed is not None:
        return listed
    columns = triton.next_power_of_2(width)
    warps = warps_for(columns * 8)
    max_rows = 16 // dtype.itemsize

    def busiest(rows: int) -> int:
        """Weight rows of the busiest multiprocessor."""
        programs = triton.cdiv(outputs, rows)
        return rows * (triton.cdiv(programs, gpu.multiprocessors) if gpu else 1)

    return Block(min((max_rows, max_rows * 3 // 4), key=busiest) if gpu else max_rows, columns, warps)


@dataclass(frozen=True, eq=False, repr=False)
class OutputProjection(Operation):
    """Combines the splits of decode_attention, projects them and adds the residual if one is given.

    Args:
        out: [rows, hidden], written, 1 to 8 rows, on a CPU to 64; may be `residual`.
        attention: from decode_attention.
        position: [rows] int32, as decode_attention had it.
        weight: [hidden, heads * head_dim].
        residual: [rows, hidden], or None.
        heads: query heads.
        window: as decode_attention had it.
        block: the weights that one program loads, always all columns; None for this GPU's table or the default. Triton
            only.
    """

    name = "output_projection"

    out: torch.Tensor
    attention: AttentionSplits
    position: torch.Tensor
    weight: torch.Tensor
    _: KW_ONLY
    residual: torch.Tensor | None = None
    heads: int
    window: int | None = None
    block: Block | None = None

    def check(self) -> None:
        rows, hidden = check_rows("out", self.out)
        heads, weight, dtype, device = self.heads, self.weight, self.out.dtype, self.out.device
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or heads < 1 or weight.shape[1] % heads:
            given = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(f"weight: expected a matrix [{hidden}, heads * head_dim] for {heads} heads, got {given}")
        width = weight.shape[1]
        check("weight", weight, (hidden, width), dtype, device)
        check_splits("attention", self.attention, rows, width, heads, self.out)
        check("position", self.position, (rows,), torch.int32, device)
        if self.residual is not None:
            check("residual", self.residual, (rows, hidden), dtype, device)

    def run_torch(self) -> None:
        output_projection_torch(self)

    def run_numba(self, call: NumbaCall) -> None:
        call(self, partial=self.attention.partial)

    def run_triton(self, launch: Launcher) -> None:
        hidden, width = self.weight.shape
        head_dim = width // self.heads
        block = self.block or output_block(hidden, width, self.out.dtype, launch.gpu)
        launch(
            output_projection_kernel,
            self,
            (triton.cdiv(hidden, block.rows),),
            block.warps,
            two_programs=True,
            partial_ptr=self.attention.partial,
            stats_ptr=self.attention.stats,
            rows=len(self.out),
            window=ALL_KEYS if self.window is None else self.window,
            OUTPUTS=hidden,
            HEADS=self.heads,
            HEAD_DIM=head_dim,
            MAX_ROWS=MAX_ROWS,
            MAX_SPLITS=MAX_SPLITS,
            SPLITS_AT_ONCE=SPLITS_AT_ONCE,
            BLOCK_KEYS=block_keys(self.out.dtype),
            PROGRAM_OUTPUTS=block.rows,
            BLOCK_OUTPUTS=triton.next_power_of_2(block.rows),
            BLOCK_HEADS=triton.next_power_of_2(self.heads),
            BLOCK_DIM=triton.next_power_of_2(head_dim),
        )

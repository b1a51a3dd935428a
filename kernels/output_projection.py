"""The join of attention's runs and the output projection, with the residual add of Gemma 1.

    x   = the attention's output, joined from its runs and rounded to d (attention_runs.py)
    out = d(x @ weight^T)                   products accumulated in fp32, rounded once
    out = d(residual + d(x @ weight^T))     where there is a residual: two roundings, as in Hugging Face

d is the model's dtype. Gemma 2 and 3 normalise the branch before it joins the stream, which needs the whole row: the
next kernel does that (its `branch`). Bytes moved: the weight, [hidden, heads * head_dim], once; the parts,
4 * heads * head_dim * runs, which every program reads from the L2 cache: programs are few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.attention_runs import (
    ALL_KEYS,
    BLOCK_KEYS,
    MAX_RUNS,
    RUNS_AT_ONCE,
    AttentionParts,
    check_parts,
    cut,
    joined_row,
)
from runtime.kernels.block import Block, listed_block, warps_for
from runtime.kernels.checks import MAX_ROWS, check, check_rows
from runtime.kernels.cpu.calls import capture
from runtime.kernels.launch import (
    gpu_of,
    held_packed,
    launch,
    let_next_kernel_start,
    use_kernel,
    wait_for_previous_kernel,
)
from runtime.kernels.residual_linear import residual_linear_reference


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
    MAX_RUNS: tl.constexpr,
    RUNS_AT_ONCE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PROGRAM_OUTPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # One program holds PROGRAM_OUTPUTS whole weight rows in registers, joins every row of x and takes it past them.
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    lane = tl.arange(0, BLOCK_OUTPUTS)
    outputs = tl.program_id(0) * PROGRAM_OUTPUTS + lane
    outputs_mask = (lane < PROGRAM_OUTPUTS) & (outputs < OUTPUTS)
    # Columns are padded head by head, so that the joined heads are a row of them.
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
    length, run, row_runs = cut(positions, window, MAX_RUNS, BLOCK_KEYS)  # [MAX_ROWS]
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for row in range(rows):
        runs = tl.max(tl.where(every_row == row, row_runs, 0), axis=0)
        x = joined_row(
            partial_ptr, stats_ptr, row, runs, HEADS, HEAD_DIM, MAX_RUNS, RUNS_AT_ONCE, BLOCK_HEADS, BLOCK_DIM
        )
        # The attention's output is a tensor of the model's dtype in Hugging Face.
        x = x.to(dtype).to(tl.float32).reshape(BLOCK_WIDTH)
        y = tl.sum(held_packed(weight).to(tl.float32) * x[None, :], axis=1).to(dtype)  # [BLOCK_OUTPUTS]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row * OUTPUTS + outputs, mask=outputs_mask, other=0.0)
            # The product was rounded before the add: two tensor operations in Hugging Face.
            y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
        tl.store(out_ptr + row * OUTPUTS + outputs, y, mask=outputs_mask)


def output_block(outputs: int, width: int, x: torch.Tensor) -> Block:
    """The block of a shape: the GPU's table's, else 8 or 6 rows a program (of 4 bytes an element, half as many),
    whichever spreads evener over the GPU. Fewer rows would mean more programs that read all the parts."""
    gpu = gpu_of(x.device)
    listed = listed_block("output_projection", outputs, width, x.dtype, gpu)
    if listed is not None:
        return listed
    columns = triton.next_power_of_2(width)
    warps = warps_for(columns * 8)
    most = 16 // x.element_size()

    def busiest(rows: int) -> int:
        """Weight rows that the busiest multiprocessor takes."""
        programs = triton.cdiv(outputs, rows)
        return rows * (triton.cdiv(programs, gpu.multiprocessors) if gpu else 1)

    return Block(min((most, most * 3 // 4), key=busiest) if gpu else most, columns, warps)


def output_projection(
    out: torch.Tensor,
    attention: AttentionParts,
    position: torch.Tensor,
    weight: torch.Tensor,
    *,
    heads: int,
    window: int | None = None,
    residual: torch.Tensor | None = None,
    block: Block | None = None,
) -> None:
    """Joins the runs that decode_attention left, projects them and adds the residual if one is given.

    Args:
        out: [rows, hidden], written, 1 to 8 rows; may be `residual`.
        attention: what decode_attention left for these rows.
        position: [rows] int32, as decode_attention had it.
        weight: [hidden, heads * head_dim].
        heads: query heads.
        window: as decode_attention had it.
        residual: [rows, hidden], or None.
        block: how the kernel is cut, None for this GPU's table or the default; its columns are always all of them.
            Unused by the reference.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    rows, hidden = check_rows("out", out)
    dtype, device = out.dtype, out.device
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or heads < 1 or weight.shape[1] % heads:
        given = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"weight: expected a matrix [{hidden}, heads * head_dim] for {heads} heads, got {given}")
    width = weight.shape[1]
    check("weight", weight, (hidden, width), dtype, device)
    check_parts("attention", attention, rows, width, heads, out)
    check("position", position, (rows,), torch.int32, device)
    if residual is not None:
        check("residual", residual, (rows, hidden), dtype, device)
    if use_kernel(out):
        block = block or output_block(hidden, width, out)
        launch(
            output_projection_kernel,
            (triton.cdiv(hidden, block.rows),),
            device,
            block.warps,
            out,
            attention.partial,
            attention.stats,
            position,
            weight,
            residual,
            rows,
            ALL_KEYS if window is None else window,
            OUTPUTS=hidden,
            HEADS=heads,
            HEAD_DIM=width // heads,
            HAS_RESIDUAL=residual is not None,
            MAX_ROWS=MAX_ROWS,
            MAX_RUNS=MAX_RUNS,
            RUNS_AT_ONCE=RUNS_AT_ONCE,
            BLOCK_KEYS=BLOCK_KEYS[dtype.itemsize],
            PROGRAM_OUTPUTS=block.rows,
            BLOCK_OUTPUTS=triton.next_power_of_2(block.rows),
            BLOCK_HEADS=triton.next_power_of_2(heads),
            BLOCK_DIM=triton.next_power_of_2(width // heads),
            two_programs=True,
        )
        return
    if capture("residual_linear", out, attention.joined, weight, residual):
        return
    residual_linear_reference(out, attention.joined, weight, residual=residual)

"""How a product is launched, in whichever form its block says (matvec.py)."""

from __future__ import annotations

from typing import Any

from runtime.kernels.block import HELD_MAX_ROWS, block_for
from runtime.kernels.checks import check
from runtime.kernels.launch import Launcher
from runtime.kernels.rms_norm import residual_norm_kernel
from runtime.kernels.scaled_matrix import COLUMNS, ScaledMatrix
from runtime.kernels.triton_function import cdiv, next_power_of_2

MIN_N = 8  # rows of the smallest product on tensor cores


def launch_product(
    launch: Launcher,
    operation: Any,
    sum_kernel: Any,
    dot_kernel: Any,
    weight: str,
    *,
    has_norm: bool,
    matrices: int = 1,
    stores_residual: bool = True,
    **extra: Any,
) -> None:
    """Launches an operation whose result is a product of its rows x and weights.

    Args:
        launch: launches kernels.
        operation: the operation, with a field `normed` if it has a norm.
        sum_kernel, dot_kernel: its kernels, of which the block selects one.
        weight: the name of the field with its weights.
        has_norm: whether x is normed, after a branch is added if there is one.
        matrices: how many the product has.
        stores_residual: whether x with the branch is stored.
        extra: parameters of the kernels that are not fields of the operation.

    Raises:
        ValueError: there are more rows than the form takes, or it needs a workspace that is not given.
    """
    matrix, x = getattr(operation, weight), operation.x
    rows, outputs, width = len(x), len(matrix) // matrices, matrix.shape[1]
    is_scaled = isinstance(matrix, ScaledMatrix)
    integers = matrix.format if is_scaled else None
    block = operation.block or block_for(
        operation.name, outputs, width, x.dtype, launch.gpu, launch.max_rows, matrices, integers
    )
    common: dict[str, Any] = {"rows": rows, "OUTPUTS": outputs, "WIDTH": width, "BLOCK_WIDTH": block.columns} | extra
    common |= {f"{weight}_ptr": matrix.q if is_scaled else matrix, "scale_ptr": matrix.scale if is_scaled else None}
    if block.form == "sum":
        programs = cdiv(outputs, block.rows)
        is_one_row = launch.max_rows == 1
        launch(
            sum_kernel, operation, (programs,), block.warps, IS_ONE_ROW=is_one_row, BLOCK_OUTPUTS=block.rows, **common
        )
        return
    is_held = block.form == "held"
    if integers == "int4" and (is_held or block.columns % COLUMNS):
        raise ValueError(f"block: expected no held form and a multiple of {COLUMNS} columns of int4, got {block}")
    if is_held and rows > HELD_MAX_ROWS:
        raise ValueError(f"x: expected at most {HELD_MAX_ROWS} rows for {block}, got {rows}")
    if has_norm and not is_held:
        kept: dict[str, Any] = {} if stores_residual else {"residual_out_ptr": None}
        check("normed", operation.normed, tuple(x.shape), x.dtype, x.device)
        launch(
            residual_norm_kernel,
            operation,
            (rows,),
            warps=4,
            WIDTH=width,
            NORM_BRANCH=operation.branch is not None,
            STORE_RESIDUAL=stores_residual and operation.branch is not None,
            BLOCK_WIDTH=next_power_of_2(width),
            **kept,
        )
        common |= {"x_ptr": operation.normed, "HAS_BRANCH": False}
        common |= dict.fromkeys(("norm_weight_ptr", "branch_ptr", "branch_norm_ptr"))  # read already
        common |= {"residual_out_ptr": None} if stores_residual else {}
    launch(
        dot_kernel,
        operation,
        (cdiv(outputs * matrices, block.rows),),
        block.warps,
        two_programs=not is_held,  # else some compilers spill to fit more programs than shared memory has room for
        IS_HELD=is_held,
        BLOCK_OUTPUTS=block.rows,
        SLICES=block.warps,
        STAGES=block.stages,
        N=max(MIN_N, next_power_of_2(rows)),
        **common,
    )

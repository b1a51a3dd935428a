"""The block of each product, which includes its form: a measured one, from the GPU's table, or a default.

A block fixes the order of a row's sums. So it may depend on the shape of the weights, on the GPU and on how many rows a
model may ever have, but on nothing that changes from step to step, such as the number of rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch

from runtime.kernels.launch import Gpu
from runtime.kernels.triton_function import next_power_of_2

HELD_MAX_ROWS = 8  # of the held form, which keeps all of them in registers
ROW_CLASSES = (1, HELD_MAX_ROWS, 64)  # the numbers of rows that blocks are measured for


class Block(NamedTuple):
    """The form of a product, and what one program of it loads."""

    form: str  # "sum", "held" or "loop": see matvec.py
    rows: int  # of weights; in the sum form of a gated product this many gate rows and as many up rows
    columns: int  # of a piece; of a slice in each pass of a loop
    warps: int  # also the number of slices of the columns, except in the sum form
    stages: int = 1  # of a loop


# Weights that one thread holds at once: enough 16-byte loads in flight, and few enough registers for two programs a
# multiprocessor. In elements for a padded block, in bytes for one in pieces.
ELEMENTS_PER_THREAD, BYTES_IN_PIECES = 64, 300
# The same for integers, per program and per thread. With fewer, more programs would each read x and norm it.
INTEGERS, INTEGERS_PER_THREAD = 32768, 256
# The widest rows that take the held form without a table: wider ones need too much shared memory for two programs on
# every GPU.
HELD_WIDTH = 1152


def sum_block(outputs: int, width: int, dtype: torch.dtype, matrices: int = 1, integers: str | None = None) -> Block:
    """The block of the sum form where no table has one: whole weight rows, in pieces where padding would waste lanes,
    else of 8192 elements (or one row)."""
    if integers is not None:
        return _sum_block_of_integers(outputs, width, matrices)
    columns, piece = next_power_of_2(width), width & -width
    if piece >= 128 and piece < width <= 16 * piece:
        warps = 4 if width > 2048 else 2
        of_row = width * matrices * dtype.itemsize / (32 * warps)  # bytes of a thread
        rows = max(1, min(1 << int(BYTES_IN_PIECES / of_row).bit_length() - 1, next_power_of_2(outputs)))
        return Block("sum", rows, piece, warps)
    elements = max(columns * matrices, 8192)
    rows = min(elements // (columns * matrices), next_power_of_2(outputs))
    return Block("sum", rows, columns, min(max(elements // (32 * ELEMENTS_PER_THREAD), 4), 16))


def _sum_block_of_integers(outputs: int, width: int, matrices: int) -> Block:
    """Whole weight rows, up to 16: as many as a program can hold, since they share the norm of x, but few enough to
    leave a program for every multiprocessor. The columns come in a power of two and what is left."""
    most = min(INTEGERS // (width * matrices), outputs // 256, 16)
    rows = _power_of_two(most)
    piece = _power_of_two(width)
    padded = piece if piece == width else piece + next_power_of_2(width - piece)
    return Block("sum", rows, piece, min(_power_of_two(rows * padded * matrices // (32 * INTEGERS_PER_THREAD)), 8))


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above a number, or 1."""
    return 1 << (max(number, 1).bit_length() - 1)


def dot_block(width: int, max_rows: int, *, is_normed: bool, integers: str | None = None) -> Block:
    """The block of a product on tensor cores where no table has one."""
    if integers == "int4":  # whole words of 128 columns; several in a pass, so that little is issued beside them
        if max_rows > HELD_MAX_ROWS:
            return Block("loop", 16, 128, 2, 2)
        if width < 2048:
            return Block("loop", 16, 128, 1, 4)
        return Block("loop", 16, 256, 2, 3) if width < 4096 else Block("loop", 16, 128, 4, 4)
    if integers == "int8":
        if max_rows > HELD_MAX_ROWS:
            return Block("loop", 16, 64, 4, 2)
        # Wide slices, for the same reason; narrow ones where wide ones would be in vain.
        return Block("loop", 16, 128, 4, 3) if width % 512 == 0 or width > 2048 else Block("loop", 16, 64, 2, 4)
    piece = width & -width  # the largest power of two that divides the width
    if max_rows <= HELD_MAX_ROWS and piece >= 128 and width <= HELD_WIDTH and not is_normed:
        return Block("held", 16, piece, 4)
    # Two programs fit a multiprocessor of every GPU from sm_80 on.
    return Block("loop", 16, 64, 4, 4) if max_rows <= HELD_MAX_ROWS else Block("loop", 32, 32, 4, 2)


@functools.cache
def _block_table(gpu_name: str) -> dict[str, list[int | str]]:
    """The measured blocks of a GPU, from blocks/<its name>.json; empty where it has none."""
    path = Path(__file__).parent / "blocks" / f"{gpu_name.lower().replace(' ', '-')}.json"
    return json.loads(path.read_text())["blocks"] if path.exists() else {}


def table_hash(gpu: Gpu | None) -> str | None:
    """SHA-256 of the blocks in a GPU's table, which fix the order of its sums; None where it has none."""
    listed = _block_table(gpu.name) if gpu else {}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest() if listed else None


def rows_class(max_rows: int | None) -> int:
    """The smallest of ROW_CLASSES that is not below `max_rows`; one row where that is not known."""
    return next((rows for rows in ROW_CLASSES if (max_rows or 1) <= rows), ROW_CLASSES[-1])


def block_key(
    kernel: str, outputs: int, width: int, dtype: torch.dtype, max_rows: int | None, integers: str | None = None
) -> str:
    """The name of a product in a block table."""
    kinds = "*".join(filter(None, (integers, str(dtype).removeprefix("torch."))))
    return f"{kernel}:{outputs}x{width}:{kinds}:{rows_class(max_rows)}"


@functools.cache
def block_for(
    kernel: str,
    outputs: int,
    width: int,
    dtype: torch.dtype,
    gpu: Gpu | None,
    max_rows: int | None = None,
    matrices: int = 1,
    integers: str | None = None,
) -> Block:
    """The block of one launch: the GPU's table's if it lists this product, else a default.

    Args:
        kernel: the operation.
        outputs, width: the shape of its weights, of each matrix if there are two.
        dtype: of the model. fp32 has the sum form alone, whose products are exact to fp32.
        gpu: None in the interpreter.
        max_rows: as in Launcher. Where it is unknown, the block is one of the sum form, which takes any number of rows.
        matrices: how many the product has.
        integers: the format of a ScaledMatrix; None for weights of the model's dtype.
    """
    listed = _block_table(gpu.name) if gpu else {}
    block = listed.get(block_key(kernel, outputs, width, dtype, max_rows, integers))
    if block is not None and (max_rows is not None or block[0] == "sum"):
        form, *sizes = block
        return Block(str(form), *map(int, sizes))
    if dtype.itemsize == 4 or max_rows is None or rows_class(max_rows) == 1:
        return sum_block(outputs, width, dtype, matrices, integers)
    return dot_block(width, max_rows, is_normed=kernel != "residual_linear", integers=integers)

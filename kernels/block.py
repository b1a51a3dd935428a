"""The block shapes of the matrix-vector kernels: measured ones, a table for each GPU, and a default."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from runtime.kernels.launch import Gpu


class Block(NamedTuple):
    """The weight rows and columns that one program loads, and its warps."""

    rows: int
    columns: int
    warps: int


# Weight elements that one thread holds at once: enough 16-byte loads in flight, few enough registers for two programs
# a multiprocessor.
ELEMENTS_PER_THREAD = 64


def default_block(outputs: int, width: int, matrices: int = 1) -> Block:
    """The block of a shape that no table lists: whole weight rows, 8192 elements (or one row) a program."""
    columns = triton.next_power_of_2(width)
    elements = max(columns * matrices, 8192)
    rows = min(elements // (columns * matrices), triton.next_power_of_2(outputs))
    return Block(rows, columns, warps_for(elements))


def warps_for(elements: int) -> int:
    """The warps of a program that holds this many weight elements, 4 to 16."""
    return min(max(elements // (32 * ELEMENTS_PER_THREAD), 4), 16)


@functools.cache
def _block_table(gpu_name: str) -> dict[str, list[int]]:
    """The measured blocks of a GPU, from blocks/<its name>.json; empty where it has none."""
    path = Path(__file__).parent / "blocks" / f"{gpu_name.lower().replace(' ', '-')}.json"
    return json.loads(path.read_text())["blocks"] if path.exists() else {}


def table_hash(gpu: Gpu | None) -> str | None:
    """SHA-256 of the blocks in a GPU's table, which fix the order of its sums; None where it has none.
    output_projection's default block depends on the number of multiprocessors instead."""
    listed = _block_table(gpu.name) if gpu else {}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest() if listed else None


def listed_block(kernel: str, outputs: int, width: int, dtype: torch.dtype, gpu: Gpu | None) -> Block | None:
    """The block that the GPU's table has for this shape, if any."""
    listed = _block_table(gpu.name) if gpu else {}
    block = listed.get(f"{kernel}:{outputs}x{width}:{str(dtype).removeprefix('torch.')}")
    return None if block is None else Block(*block)


@functools.cache
def block_for(kernel: str, outputs: int, width: int, dtype: torch.dtype, gpu: Gpu | None, matrices: int = 1) -> Block:
    """The block shape of one launch: the GPU's table if it lists this shape, else `default_block`.

    A block shape fixes the order of a row's sums, so it may depend on the shape of the weights and on the GPU, but on
    nothing that changes from step to step, such as the number of rows.
    """
    return listed_block(kernel, outputs, width, dtype, gpu) or default_block(outputs, width, matrices)

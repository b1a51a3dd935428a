"""Matrices of integers with scales, as Triton's kernels read them, from a checkpoint's blocks.

Both forms have the same number of bytes and the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from runtime.checkpoint.packing import Forms, Run
from runtime.checkpoint.stored import Readable
from runtime.errors import InvalidArgument
from runtime.kernels.cpu.block_formats import SCALE_BYTES, Format, units_of
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.scaled_matrix import COLUMNS, ScaledMatrix
from runtime.model.config import ModelConfig
from runtime.model.weights import stored_shapes

SLICE_WEIGHTS = 1 << 24  # repacked at a time


def is_scaled(device: torch.device) -> bool:
    """Whether quantised matrices on a device are integers with scales: on a GPU or under TRITON_INTERPRET=1."""
    return device.type != "cpu" or INTERPRETING


def check_scaled(forms: Forms, config: ModelConfig) -> None:
    """Check that Triton has kernels for every matrix in blocks: rows of int8, and Q4_0 of whole words.

    Raises:
        InvalidArgument: it has none for one, which is named.
    """
    for name, (_, *columns) in stored_shapes(config).items():
        form = forms[name]
        if form is not None and not form.is_row and (form.name != "Q4_0" or columns[0] % COLUMNS):
            raise InvalidArgument(
                f"{name}: expected rows of int8 or, for int4 on a GPU, a multiple of {COLUMNS} columns, got "
                f'{form.name} with {columns[0]} (quantize="int8" takes any)'
            )


def read_scaled(
    memory: torch.Tensor, run: Run, stored: Mapping[str, Readable], progress: Callable[[int], None] | None = None
) -> ScaledMatrix:
    """Read the stored tensors of a packed matrix, one at a time through the CPU's memory.

    Args:
        memory: uint8 of the shape `run.memory`, contiguous, on any device; it becomes the matrix's memory.
        run: what is packed.
        stored: the tensors by name, in blocks of `run.form`.
        progress: as `read_weights`.

    Raises:
        CheckpointError: as `read_weights`.
    """
    assert run.form is not None
    matrix, first = _over(memory, run.form), 0
    for name in run.shapes:
        blocks = stored[name].blocks
        assert blocks is not None, "a run's format is that of its blocks"
        given = torch.empty(run.shapes[name][0], memory.shape[1], dtype=torch.uint8, device="cpu")
        blocks.copy_into(given, progress)
        for rows in given.split(max(1, SLICE_WEIGHTS // matrix.shape[1])):
            made, end = _repacked(rows.to(memory.device), run.form), first + len(rows)
            matrix.q[first:end], matrix.scale[first:end] = made.q, made.scale
            first = end
    return matrix


def _over(memory: torch.Tensor, form: Format) -> ScaledMatrix:
    """A matrix in the memory of its blocks: all of its integers, then their scales."""
    rows, row_bytes = memory.shape
    scale_bytes = SCALE_BYTES if form.is_row else row_bytes // form.stored_bytes * 2
    q, scale = memory.view(-1).split((rows * (row_bytes - scale_bytes), rows * scale_bytes))
    if form.is_row:
        return ScaledMatrix(q.view(torch.int8).view(rows, -1), scale.view(torch.float32))
    return ScaledMatrix(q.view(torch.int16).view(rows, -1), scale.view(torch.int64).view(rows, -1))


def _repacked(blocks: torch.Tensor, form: Format) -> ScaledMatrix:
    """A matrix of some rows of blocks [rows, bytes], as block_formats.py has them in memory."""
    integers, scales = [], []
    for kind in units_of(form, blocks.shape[1] // form.bytes * form.columns):
        units = kind.of(blocks)
        if form.is_row:
            q = units
        else:
            scales.append(units[..., : -32 * kind.groups].flatten(1))
            nibbles = units[..., -32 * kind.groups :].unflatten(2, (kind.groups, 32))
            q = torch.cat((nibbles & 15, nibbles >> 4), dim=3)
        # [rows, units, groups, l // blocks, l % blocks, 4] to [rows, units, blocks, l // blocks, groups, 4]
        lanes = q.reshape(len(q), kind.count, kind.groups, -1, 2 * kind.groups, 4)
        integers.append(lanes.permute(0, 1, 4, 3, 2, 5).reshape(len(q), -1))
    q = torch.cat(integers, dim=1)
    if form.is_row:
        scale = blocks[:, :SCALE_BYTES].contiguous().view(torch.float32).view(len(blocks))
        return ScaledMatrix((q ^ 0x80).view(torch.int8), scale)
    return ScaledMatrix.of_groups(q, torch.cat(scales, dim=1).view(torch.float16))

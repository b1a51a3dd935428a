"""Weights as blocks of integers with scales (kernels/cpu/block_formats.py): rows of int8, and groups of Q4_0.

Both are symmetric, and need nothing but the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.kernels.cpu.block_formats import FORMATS, Format

REVISION = 2  # of what is made here, and of blocks in memory: part of the cache's names, to be raised with either
GROUP = FORMATS["Q4_0"].stored_columns
_STEPS = (-8, 7, 6, 5, 4, 3, 2, 1)  # of a grid, at which a group's largest weight may lie
_FIRST = 2  # weights of a group that say whether the others are worth a look


def blocks_of(values: torch.Tensor, form: Format) -> torch.Tensor:
    """The blocks of a matrix.

    Args:
        values: [rows, columns] fp32, finite.
        form: rows of int8, or Q4_0.

    Returns:
        [rows, bytes of a row] uint8, as a file has them (`kept` rearranges them for memory).

    Raises:
        OverflowError: a scale of Q4_0 is beyond fp16, or 127 times that of an int8 row beyond fp32.
    """
    return int8_rows_of(values) if form.is_row else q4_0_of(values)


def int8_rows_of(values: torch.Tensor) -> torch.Tensor:
    """Rows of int8: the scale is a row's largest magnitude / 127, rounded to fp32, and each weight becomes the nearest
    multiple of it, ties to even; a row of zeros stays zero.

    Args:
        values: [rows, columns] fp32.

    Returns:
        [rows, 4 + columns] uint8.

    Raises:
        OverflowError: the scale was rounded up, and 127 times it is beyond fp32.
    """
    scale = values.abs().amax(1, keepdim=True) / 127
    if not (scale * 127).isfinite().all():
        raise OverflowError(f"127 of a row's scale must be a number of fp32, got a scale of {scale.max():g}")
    # Where a scale underflows to 0, every integer is 0; a subnormal one may be rounded down so far that an integer
    # would exceed 127.
    q = torch.round(values / torch.where(scale > 0, scale, 1)).clamp_(-127, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), q.view(torch.uint8)), 1)


def q4_0_of(values: torch.Tensor) -> torch.Tensor:
    """Groups of Q4_0: the blocks that llama.cpp makes, except that groups whose weights lie on another grid of Q4_0
    keep it.

    llama.cpp's scale is a group's largest weight / -8, which finds the grid of a group that reaches -8 steps. A group
    that does not is tried with its largest weight at 7 steps, 6 and so on. It lies on a grid if every weight is a whole
    number of steps: exactly, and then it comes back bit for bit (but for the sign of a zero), or once rounded to bf16.
    The bf16 files of Google's QAT checkpoints are of the second kind: scales are numbers of bf16, and their products
    with a group's steps are rounded to bf16. Where such a scale is at least 2^-17, and so a number of fp16 too, it is
    found with the steps: rounded to bf16, the values are the file's, bit for bit.

    Sources: quantize_row_q4_0_ref of ggml-quants.c, in the `gguf` package quants.Q4_0; for Google's scales
    https://unsloth.ai/docs/models/gemma-4/qat and https://github.com/ggml-org/llama.cpp/pull/24603.

    Args:
        values: [rows, columns] fp32, columns a multiple of 32.

    Returns:
        [rows, columns / 32 * 18] uint8.

    Raises:
        OverflowError: a group's scale is beyond fp16.
    """
    groups = values.reshape(-1, GROUP)
    peak = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    exact = peak / -8
    scale = exact.half()
    if not scale.isfinite().all():
        raise OverflowError(f"a group's scale must be at most 65504, got {exact.abs().max():g}")
    codes = (groups * torch.where(scale == 0, 0, 1 / exact) + 8.5).to(torch.uint8).clamp_(0, 15)
    _keep_grids(groups, peak, scale, codes)
    low, high = codes.view(-1, 2, GROUP // 2).unbind(1)
    blocks = torch.cat((scale.view(torch.uint8), low | high << 4), 1)
    return blocks.view(len(values), -1)


def _keep_grids(groups: torch.Tensor, peak: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> None:
    """Replace scale [groups, 1] fp16 and codes [groups, 32] of groups that lie on another grid."""
    for rounded, scales_of in ((torch.Tensor.float, _nearest_halves), (torch.Tensor.bfloat16, _nearest_bfloats)):
        is_open = ~_lies_on(groups, scale, codes, rounded)
        for found in (each for steps in _STEPS for each in scales_of(peak / steps)):
            first = groups[:, :_FIRST]
            (index,) = (is_open & _lies_on(first, found, _codes(first, found), rounded)).nonzero(as_tuple=True)
            chosen = _codes(groups[index], found[index])
            fits = _lies_on(groups[index], found[index], chosen, rounded)
            index = index[fits]
            scale[index], codes[index] = found[index], chosen[fits]
            is_open[index] = False


def _nearest_halves(scale: torch.Tensor) -> list[torch.Tensor]:
    return [scale.half()]


def _nearest_bfloats(scale: torch.Tensor) -> list[torch.Tensor]:
    """The nearest number of bf16 and its neighbours: the largest weight was rounded before it was divided."""
    bits = scale.bfloat16().view(torch.int16)
    return [(bits + step).view(torch.bfloat16).half() for step in (0, -1, 1)]


def _codes(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    steps = torch.round(groups / torch.where(scale == 0, 1, scale).float())
    return (steps.clamp_(-8, 7) + 8).to(torch.uint8)


def _lies_on(
    groups: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Whether each group's weights are the values of its blocks, once those are rounded; [groups]."""
    return (rounded(scale.float() * (codes.float() - 8)) == groups).all(1)

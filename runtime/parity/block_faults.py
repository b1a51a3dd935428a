"""Faults in reading blocks, which an audit of a quantised model plants in one matrix and must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.kernels.cpu.block_formats import INT8, SCALE_BYTES, Format, dequantized
from runtime.kernels.quantized import QuantizedMatrix
from runtime.kernels.scaled_matrix import GROUP, ScaledMatrix

# Where a block, as it is in memory, has its integers: one a byte, or two, in nibbles.
_BYTES = {INT8: range(0), "Q8_0": range(4, 68)}  # of a row of int8 all but its scale
_NIBBLES = {"Q4_0": range(4, 36), "Q4_1": range(8, 40), "Q5_0": range(12, 44), "Q5_1": range(16, 48)}
_NIBBLES |= {"Q4_K": range(20, 148), "Q5_K": range(52, 180)}
_HIGH_BITS = {"Q5_0": range(4, 12), "Q5_1": range(8, 16), "Q5_K": range(20, 52)}
_Q6_K = torch.arange(18, 210).view(4, 48)  # of each group 32 bytes of nibbles, and 16 of high bits
# And its scales, and minimums: from a byte to another, each of so many.
_PAIR = [(0, 4, 2)]
_SCALES = {INT8: [(0, SCALE_BYTES, SCALE_BYTES)], "Q8_0": _PAIR, "Q4_0": _PAIR, "Q5_0": _PAIR, "Q6_K": [(0, 2, 2)]}
_SCALES |= {key: [(0, 4, 2), (4, 8, 2)] for key in ("Q4_1", "Q5_1")}
_SCALES |= {key: [(0, 2, 2), (2, 4, 2)] for key in ("Q4_K", "Q5_K")}
_ZERO_POINTS = {"Q4_0": 8, "Q5_0": 16, "Q6_K": 32}
_WITH_MINIMUM = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")


def misread(matrix: QuantizedMatrix | ScaledMatrix) -> dict[str, torch.Tensor]:
    """The values of a matrix whose first part is misread, by what is wrong: each fault that its format can have."""
    if isinstance(matrix, ScaledMatrix):
        return _misread_words(matrix) if matrix.format == "int4" else _misread_bytes(matrix)
    first, *others = matrix.parts
    form, rest = first.format, [_values(part.data, part.format) for part in others]
    faults: dict[str, Callable[[torch.Tensor, Format], torch.Tensor]] = {"the neighbour's scale": _neighbours_scale}
    if form.layout not in _BYTES:
        faults["nibbles swapped"] = _nibbles_swapped
    if form.layout in _WITH_MINIMUM:
        faults["the minimum subtracted twice"] = _minimum_twice
    else:
        faults["the zero point off by one"] = _zero_point_off
    return {name: torch.cat([plant(first.data, form), *rest]) for name, plant in faults.items()}


def _misread_bytes(matrix: ScaledMatrix) -> dict[str, torch.Tensor]:
    return {
        "the neighbour's scale": ScaledMatrix(matrix.q, matrix.scale.roll(1)).dequantized(),
        "the zero point off by one": matrix.dequantized() - matrix.scale[:, None],
    }


def _misread_words(matrix: ScaledMatrix) -> dict[str, torch.Tensor]:
    q, d = matrix.groups()
    pairs = q.view(len(q), -1, 2, GROUP).flip(2).view(q.shape)  # the lower nibbles of each byte for the upper
    return {
        "the neighbour's scale": ScaledMatrix.of_groups(q, d.view(-1).roll(1).view(d.shape)).dequantized(),
        "nibbles swapped": ScaledMatrix.of_groups(pairs, d).dequantized(),
        "the zero point off by one": matrix.dequantized() - d.float().repeat_interleave(GROUP, dim=1),
    }


def _values(data: torch.Tensor, form: Format) -> torch.Tensor:
    return torch.from_numpy(dequantized(data.numpy(), form))


def _blocks(data: torch.Tensor, form: Format) -> torch.Tensor:
    """A copy, [blocks, bytes]."""
    return data.reshape(-1, form.bytes).clone()


def _integers(form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of a block that have its integers, and those that have the high bits of some."""
    if form.layout == "Q6_K":
        return _Q6_K[:, :32].flatten(), _Q6_K[:, 32:].flatten()
    if form.is_row:
        return torch.arange(SCALE_BYTES, form.bytes), torch.arange(0)
    return torch.tensor([*(_BYTES | _NIBBLES)[form.layout]]), torch.tensor(
        [*_HIGH_BITS.get(form.layout, ())], dtype=torch.int64
    )


def _neighbours_scale(data: torch.Tensor, form: Format) -> torch.Tensor:
    blocks = _blocks(data, form)
    for first, end, size in _SCALES[form.layout]:
        given = blocks[:, first:end]
        blocks[:, first:end] = given.reshape(-1, size).roll(1, 0).reshape(given.shape)
    return _values(blocks.view(data.shape), form)


def _nibbles_swapped(data: torch.Tensor, form: Format) -> torch.Tensor:
    blocks = _blocks(data, form)
    places, _ = _integers(form)
    blocks[:, places] = blocks[:, places] << 4 | blocks[:, places] >> 4
    return _values(blocks.view(data.shape), form)


def _at(data: torch.Tensor, form: Format, q: int) -> torch.Tensor:
    """The values that the integer 0, or in a format of bytes another, has in each place."""
    blocks = _blocks(data, form)
    places, high = _integers(form)
    blocks[:, places], blocks[:, high] = q, 0
    return _values(blocks.view(data.shape), form)


def _minimum_twice(data: torch.Tensor, form: Format) -> torch.Tensor:
    return _values(data, form) + _at(data, form, 0)


def _zero_point_off(data: torch.Tensor, form: Format) -> torch.Tensor:
    scale = _at(data, form, 128 + 1) if form.layout in _BYTES else _at(data, form, 0) / -_ZERO_POINTS[form.layout]
    return _values(data, form) - scale

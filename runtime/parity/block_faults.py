"""Faults in reading blocks, which an audit of a quantised model plants in one matrix and must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.kernels.cpu.block_formats import INT8, SCALE_BYTES, Format, dequantized
from runtime.kernels.quantized import QuantizedMatrix

# Where a block, as it is kept, has its integers: one a byte, or two, in nibbles.
_BYTES = {INT8: slice(SCALE_BYTES, None), "Q8_0": slice(2, None)}
_NIBBLES = {"Q4_0": slice(2, None), "Q4_1": slice(4, None), "Q5_0": slice(6, None), "Q5_1": slice(8, None)}
_NIBBLES |= {"Q4_K": slice(20, None), "Q5_K": slice(52, None), "Q6_K": slice(0, 128)}
_HIGH_BITS = {"Q5_0": slice(2, 6), "Q5_1": slice(4, 8), "Q5_K": slice(20, 52), "Q6_K": slice(128, 192)}
_ZERO_POINTS = {"Q4_0": 8, "Q5_0": 16, "Q6_K": 32}
_WITH_MINIMUM = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")


def misread(matrix: QuantizedMatrix) -> dict[str, torch.Tensor]:
    """The values of a matrix whose first part is misread, by what is wrong: each fault that its format can have."""
    first, *others = matrix.parts
    form, rest = first.format, [_values(part.data, part.format) for part in others]
    faults: dict[str, Callable[[torch.Tensor, Format], torch.Tensor]] = {"the neighbour's scale": _neighbours_scale}
    if form.name in _NIBBLES:
        faults["nibbles swapped"] = _nibbles_swapped
    if form.name in _WITH_MINIMUM:
        faults["the minimum subtracted twice"] = _minimum_twice
    else:
        faults["the zero point off by one"] = _zero_point_off
    return {name: torch.cat([plant(first.data, form), *rest]) for name, plant in faults.items()}


def _values(data: torch.Tensor, form: Format) -> torch.Tensor:
    return torch.from_numpy(dequantized(data.numpy(), form))


def _blocks(data: torch.Tensor, form: Format) -> torch.Tensor:
    """A copy, [blocks, bytes]."""
    return data.reshape(-1, form.bytes).clone()


def _neighbours_scale(data: torch.Tensor, form: Format) -> torch.Tensor:
    blocks = _blocks(data, form)
    for at in form.halves_at or (0, 2):  # of a row of int8 the four bytes of its scale
        blocks[:, at : at + 2] = blocks[:, at : at + 2].roll(1, 0)
    return _values(blocks.view(data.shape), form)


def _nibbles_swapped(data: torch.Tensor, form: Format) -> torch.Tensor:
    blocks = _blocks(data, form)
    bytes_ = blocks[:, _NIBBLES[form.name]]
    blocks[:, _NIBBLES[form.name]] = bytes_ << 4 | bytes_ >> 4
    return _values(blocks.view(data.shape), form)


def _at(data: torch.Tensor, form: Format, q: int) -> torch.Tensor:
    """The values that the integer 0, or in a format of bytes another, has in each place."""
    blocks = _blocks(data, form)
    blocks[:, (_BYTES | _NIBBLES)[form.name]] = q
    if form.name in _HIGH_BITS:
        blocks[:, _HIGH_BITS[form.name]] = 0
    return _values(blocks.view(data.shape), form)


def _minimum_twice(data: torch.Tensor, form: Format) -> torch.Tensor:
    return _values(data, form) + _at(data, form, 0)


def _zero_point_off(data: torch.Tensor, form: Format) -> torch.Tensor:
    scale = _at(data, form, 1) if form.name in _BYTES else _at(data, form, 0) / -_ZERO_POINTS[form.name]
    return _values(data, form) - scale

"""Faults in reading blocks, which an audit of a quantised model plants in one matrix and must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.kernels.cpu.block_formats import SCALE_BYTES, Format, Units, units_of
from runtime.kernels.cpu.block_values import dequantized
from runtime.kernels.quantized import QuantizedMatrix
from runtime.kernels.scaled_matrix import GROUP, ScaledMatrix

_ZERO_POINTS = {"Q4_0": 8, "Q5_0": 16, "Q6_K": 32}
_WITH_MINIMUM = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
_Q6_K = torch.arange(18, 210).view(4, 48)  # per group: 32 bytes of nibbles, 16 of high bits


def misread(matrix: QuantizedMatrix | ScaledMatrix) -> dict[str, torch.Tensor]:
    """The values of a matrix whose first part is misread, keyed by the fault: one for each that its format can have."""
    if isinstance(matrix, ScaledMatrix):
        return _misread_words(matrix) if matrix.format == "int4" else _misread_bytes(matrix)
    first, *others = matrix.parts
    form, rest = first.format, [_values(part.data, part.format) for part in others]
    faults: dict[str, Callable[[torch.Tensor, Format], torch.Tensor]] = {"the neighbour's scale": _neighbours_scale}
    if not _has_bytes(form):
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
    pairs = q.view(len(q), -1, 2, GROUP).flip(2).view(q.shape)  # swaps the lower and upper nibble of each byte
    return {
        "the neighbour's scale": ScaledMatrix.of_groups(q, d.view(-1).roll(1).view(d.shape)).dequantized(),
        "nibbles swapped": ScaledMatrix.of_groups(pairs, d).dequantized(),
        "the zero point off by one": matrix.dequantized() - d.float().repeat_interleave(GROUP, dim=1),
    }


def _values(data: torch.Tensor, form: Format) -> torch.Tensor:
    return torch.from_numpy(dequantized(data.numpy(), form))


def _has_bytes(form: Format) -> bool:
    """Whether its integers take a byte each; other formats have nibbles, and some keep high bits elsewhere."""
    return form.is_row or form.layout == "Q8_0"


def _changed(data: torch.Tensor, form: Format, change: Callable[[torch.Tensor, Units], None]) -> torch.Tensor:
    """The values of a matrix after `change` has edited its units [rows, units, bytes], one kind of unit at a time."""
    changed = data.clone()
    for kind in units_of(form, data.shape[1] // form.bytes * form.columns):
        change(kind.of(changed), kind)
    return _values(changed, form)


def _integers(form: Format, kind: Units) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices of a unit's bytes that hold its integers, and of those that hold high bits, if it has any."""
    if form.layout == "Q6_K":
        return _Q6_K[:, :32].flatten(), _Q6_K[:, 32:].flatten()
    places = torch.arange(kind.bytes - (64 if _has_bytes(form) else 32) * kind.groups, kind.bytes)
    first = int(places[0])
    return places, torch.arange(first - 8 * kind.groups if form.layout[1] == "5" else first, first)


def _neighbours_scale(data: torch.Tensor, form: Format) -> torch.Tensor:
    if form.is_row:
        scales = data[:, :SCALE_BYTES].roll(1, 0)
        return _values(torch.cat((scales, data[:, SCALE_BYTES:]), 1), form)

    def change(units: torch.Tensor, kind: Units) -> None:
        # The fp16 numbers at the start of a unit: one for each block of 32, or a single one in formats of 256 columns.
        size = 2 if form.columns == 256 else 4 * kind.groups
        for first in range(0, size * (2 if form.layout in _WITH_MINIMUM else 1), size):
            given = units[..., first : first + size]
            units[..., first : first + size] = given.reshape(-1, 2).roll(1, 0).reshape(given.shape)

    return _changed(data, form, change)


def _nibbles_swapped(data: torch.Tensor, form: Format) -> torch.Tensor:
    def change(units: torch.Tensor, kind: Units) -> None:
        places, _ = _integers(form, kind)
        units[..., places] = units[..., places] << 4 | units[..., places] >> 4

    return _changed(data, form, change)


def _at(data: torch.Tensor, form: Format, q: int) -> torch.Tensor:
    """The values of a matrix with `q` in every byte that holds integers, and every high bit 0."""

    def change(units: torch.Tensor, kind: Units) -> None:
        places, high = _integers(form, kind)
        units[..., places], units[..., high] = q, 0

    return _changed(data, form, change)


def _minimum_twice(data: torch.Tensor, form: Format) -> torch.Tensor:
    return _values(data, form) + _at(data, form, 0)


def _zero_point_off(data: torch.Tensor, form: Format) -> torch.Tensor:
    scale = _at(data, form, 128 + 1) if _has_bytes(form) else _at(data, form, 0) / -_ZERO_POINTS[form.layout]
    return _values(data, form) - scale

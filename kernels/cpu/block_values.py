"""The fp32 values of blocks of integers with scales, as they are in memory (block_formats.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime.kernels.cpu import availability
from runtime.kernels.cpu.block_formats import BF16, COLUMNS, INT8, LANES, SCALE_BYTES, Format, units_of


def dequantized(data: np.ndarray, form: Format) -> np.ndarray:
    """The values of blocks.

    Args:
        data: [rows, bytes] uint8, rows as they are in memory.
        form: their format.

    Returns:
        [rows, columns] fp32.
    """
    if form.layout == BF16:
        return (np.ascontiguousarray(data).view("<u2").astype(np.uint32) << 16).view(np.float32)
    out = np.empty((len(data), data.shape[1] // form.bytes * form.columns), np.float32)
    scales = data[:, :SCALE_BYTES].copy().view("<f4")[..., None] if form.is_row else None
    for kind in units_of(form, out.shape[1]):
        found = _VALUES[form.layout](_Units(kind.of(data), kind.groups, form.has_bfloats, scales))
        out[:, kind.column :][:, : kind.count * kind.groups * COLUMNS] = found.reshape(len(data), -1)
    return out


@dataclass(frozen=True)
class _Units:
    """Units [rows, units, bytes] as in memory, of `groups` groups each; for INT8 with the scale of each row."""

    data: np.ndarray
    groups: int
    has_bfloats: bool
    row_scale: np.ndarray | None

    def scales(self, at: int) -> np.ndarray:
        """A scale or minimum for each block, from a byte on: [..., blocks, 1] fp32."""
        halves = self.data[..., at : at + 4 * self.groups].copy()
        if self.has_bfloats:
            return (halves.view("<u2").astype(np.uint32) << 16).view(np.float32)[..., None]
        return halves.view("<f2").astype(np.float32)[..., None]

    def half(self, at: int) -> np.ndarray:
        """The fp16 from a byte on, [..., 1] fp32."""
        return self.data[..., at : at + 2].copy().view("<f2").astype(np.float32)

    def whole(self) -> np.ndarray:
        """q of 8 bits, which come last: [..., blocks, 32]."""
        q_bytes = COLUMNS * self.groups
        return self._by_column(self.data[..., -q_bytes:].reshape(*self.data.shape[:2], self.groups, COLUMNS))

    def nibbles(self, bits_at: int | None = None) -> np.ndarray:
        """q [..., blocks, 32] of nibbles, which come last, with highest bits from byte `bits_at` on if there are
        any."""
        shape = *self.data.shape[:2], self.groups
        data = self.data[..., -32 * self.groups :].reshape(*shape, 32)
        q = np.concatenate((data & 15, data >> 4), axis=-1)
        if bits_at is not None:
            bits = np.unpackbits(self.data[..., bits_at : bits_at + 8 * self.groups, None], axis=-1, bitorder="little")
            in_order = bits if availability.takes_masks() else bits.swapaxes(-2, -1)
            q |= in_order.reshape(*shape, COLUMNS) << 4
        return self._by_column(q)

    def nibbles_and_pairs(self) -> np.ndarray:
        """q [..., blocks, 32] of 6 bits."""
        data = self.data[..., -48 * self.groups :].reshape(*self.data.shape[:2], self.groups, 48)
        low = np.concatenate((data[..., :32] & 15, data[..., :32] >> 4), axis=-1)
        high = data[..., None, 32:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3  # [..., 4, 16]
        return self._by_column(low | high.reshape(low.shape) << 4)

    def _by_column(self, q: np.ndarray) -> np.ndarray:
        """[..., groups, 64] in the order of a unit as [..., blocks, 32] by column."""
        blocks = 2 * self.groups
        lanes = q.reshape(*q.shape[:-2], self.groups, LANES // blocks, blocks, 4)
        return lanes.transpose(0, 1, 4, 3, 2, 5).reshape(*q.shape[:-2], blocks, 32)


def _signed(q: np.ndarray, zero: int) -> np.ndarray:
    return (q.astype(np.int16) - zero).astype(np.float32)


def _k(unit: _Units) -> np.ndarray:
    """Q4_K and Q5_K."""
    d, e = (unit.half(at)[..., None] for at in (0, 2))
    scales, minimums = (unit.data[..., at : at + 8].astype(np.float32)[..., None] for at in (4, 12))
    q = unit.nibbles(20 if unit.data.shape[-1] == 180 else None)
    return (d * scales) * q - e * minimums


def _q6_k(unit: _Units) -> np.ndarray:
    q, data = _signed(unit.nibbles_and_pairs(), 32), unit.data
    by_lane = data[..., 2:18].copy().view(np.int8).reshape(*data.shape[:2], 2, 8)
    scales = unit.half(0)[..., None] * by_lane.swapaxes(2, 3)
    return scales[..., None] * q.reshape(*q.shape[:-1], 2, 16)


def _int8(unit: _Units) -> np.ndarray:
    assert unit.row_scale is not None
    return unit.row_scale[..., None] * _signed(unit.whole(), 128)


_VALUES: dict[str, Callable[[_Units], np.ndarray]] = {  # fp32, by column
    "Q8_0": lambda unit: unit.scales(0) * _signed(unit.whole(), 128),
    "Q4_0": lambda unit: unit.scales(0) * _signed(unit.nibbles(), 8),
    "Q4_1": lambda unit: unit.scales(0) * unit.nibbles() + unit.scales(4 * unit.groups),
    "Q5_0": lambda unit: unit.scales(0) * _signed(unit.nibbles(4 * unit.groups), 16),
    "Q5_1": lambda unit: unit.scales(0) * unit.nibbles(8 * unit.groups) + unit.scales(4 * unit.groups),
    "Q4_K": _k,
    "Q5_K": _k,
    "Q6_K": _q6_k,
    INT8: _int8,
}

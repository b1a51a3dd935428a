"""Rearranges blocks of integers with scales from a file's order into memory's (block_formats.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from runtime.kernels.cpu import availability
from runtime.kernels.cpu.block_formats import BF16, COLUMNS, LANES, SCALE_BYTES, UNITS, Format, units_of

_NIBBLES = np.uint32(0x0F0F0F0F)
_PAIRS = np.uint32(0x03030303)


def kept(stored: np.ndarray, form: Format, out: np.ndarray | None = None) -> np.ndarray:
    """Blocks in memory's order.

    Args:
        stored: [rows, bytes] uint8, blocks in a file's order, rows of a multiple of COLUMNS columns.
        form: their format.
        out: [rows, bytes] uint8, contiguous; overwritten. None for a new array.

    Returns:
        `out`.
    """
    columns = stored.shape[1] // form.stored_bytes * form.stored_columns
    if out is None:
        out = np.empty((len(stored), columns // form.columns * form.bytes), np.uint8)
    if form.layout == BF16:
        np.copyto(out, stored)
    elif form.columns == UNITS[0] * COLUMNS and not form.is_row:
        _KEEP[form.layout](stored.reshape(-1, form.stored_bytes), out.reshape(-1, form.bytes))
    else:
        order, flips = _order(form, columns)
        np.take(stored.view("<u2"), order, axis=1, out=out.view("<u2"), mode="clip")
        if flips.any():
            out ^= flips
        if form.layout in ("Q5_0", "Q5_1"):
            _keep_highest_bits(stored, out, form)
    return out


@functools.lru_cache(maxsize=64)
def _order(form: Format, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """How rows of blocks of 32 columns, or of int8, are rearranged.

    Returns:
        For each 16-bit number of a row in memory, the place of its source in the stored row (any for highest bits,
        which are filled in later); for each byte in memory, the bits to flip.
    """
    size, q_bytes = (32, 32) if form.is_row else (form.stored_bytes, 32 if form.layout == "Q8_0" else 16)
    has_bits, first = form.layout in ("Q5_0", "Q5_1"), SCALE_BYTES if form.is_row else 0
    sources, flips = [*range(0, first, 2)], [0] * first
    for groups, column in _all_units(columns):
        blocks = [first + (column // 32 + block) * size for block in range(2 * groups)]
        numbers = [block + at for at in range(0, size - q_bytes - 4 * has_bits, 2) for block in blocks]
        numbers += [0] * (4 * groups * has_bits)
        sources += numbers
        flips += [0] * (2 * len(numbers))
        for group in range(groups):
            for lane in range(q_bytes // 2):  # a word of nibbles also has those of the lane eight further on
                block, four = _fours_of(lane, group, groups)
                at = blocks[block] + size - q_bytes + 4 * four
                sources += [at, at + 2]
                flips += [0x80 * (q_bytes == 32)] * 4
    return np.array(sources, np.intp) // 2, np.array(flips, np.uint8)


def _all_units(columns: int) -> Iterator[tuple[int, int]]:
    """The groups and the first column of each unit of a row."""
    column = 0
    for groups in UNITS:
        while columns - column >= groups * COLUMNS:
            yield groups, column
            column += groups * COLUMNS


def _fours_of(lane: int, group: int, groups: int) -> tuple[int, int]:
    """Which block of a unit a lane belongs to, and which four of the block's columns it has in a group."""
    return lane % (2 * groups), lane // (2 * groups) * groups + group


def _keep_highest_bits(stored: np.ndarray, out: np.ndarray, form: Format) -> None:
    """Writes the highest bits of blocks of Q5_0 or Q5_1 to `out`."""
    at = form.stored_bytes - 20
    by_column = stored.reshape(len(stored), -1, form.stored_bytes)[..., at : at + 4].reshape(len(stored), -1)
    bits = _highest_bits(by_column)
    for kind in units_of(form, 8 * by_column.shape[1]):
        some = bits[:, kind.column // 8 :][:, : kind.count * kind.groups * 8]
        placed = _placed(some.reshape(len(out), kind.count, -1), kind.groups)
        kind.of(out)[..., 2 * at * kind.groups :][..., : 8 * kind.groups] = placed


def _highest_bits(by_column: np.ndarray) -> np.ndarray:
    """The highest bits of a row's columns, [rows, bytes], from the order of columns into that of q."""
    words = _words(by_column)
    fours = np.concatenate((words & _NIBBLES, words >> np.uint32(4) & _NIBBLES), axis=1).view(np.uint8)
    pairs = np.take(fours, _order_of_fours(8 * by_column.shape[1]), axis=1, mode="clip").view("<u2")
    return (pairs | pairs >> np.uint16(4)).astype(np.uint8)


def _placed(bits: np.ndarray, groups: int) -> np.ndarray:
    """The highest bits of units of so many groups, [..., bytes], from the order of q into memory's."""
    if availability.takes_masks():
        return bits
    by_place = bits.reshape(-1, 8, groups).swapaxes(1, 2)
    return _transposed(np.ascontiguousarray(by_place)).reshape(bits.shape)


@functools.lru_cache(maxsize=64)
def _order_of_fours(columns: int) -> np.ndarray:
    """For each lane of each group of a row, in memory's order, the place of its four bits among the `fours` of
    `_highest_bits`, which have four bits a byte: first the lower halves of all original bytes, then the upper ones."""
    sources = []
    for groups, column in _all_units(columns):
        for group in range(groups):
            for lane in range(LANES):
                block, four = _fours_of(lane, group, groups)
                byte, half = divmod(column // 4 + 8 * block + four, 2)
                sources.append(columns // 8 * half + byte)
    return np.array(sources, np.intp)


def _words(data: np.ndarray) -> np.ndarray:
    """[..., 4n] bytes as [..., n] uint32."""
    return np.ascontiguousarray(data).view("<u4")


def _bytes(words: np.ndarray) -> np.ndarray:
    """[units, ...] integers as [units, bytes]."""
    return np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)


def _kept_scales(given: np.ndarray) -> list[np.ndarray]:
    """d, e, s and t of Q4_K and Q5_K."""
    low, middle, high = given[..., 4:8], given[..., 8:12], given[..., 12:16]
    scales = (low & 63, high & 15 | low >> 6 << 4)  # of the first four blocks of 32 columns, and of the last four
    minimums = (middle & 63, high >> 4 | middle >> 6 << 4)
    return [given[..., :4], *scales, *minimums]


def _kept_nibbles(q: np.ndarray) -> np.ndarray:
    """Values below 16 by column, four a word, [units, 8 blocks, 8], as nibbles in memory's order: [units, 4 groups, 32]
    bytes."""
    words = q[..., :4] | q[..., 4:] << np.uint32(4)  # those of lanes below 8, and of the lanes eight further on
    return np.ascontiguousarray(words.swapaxes(1, 2)).view(np.uint8)


def _transposed(data: np.ndarray) -> np.ndarray:
    """Each eight bytes of [..., 8n] transposed as an 8 x 8 matrix of bits: bit j of byte i becomes bit i of byte j."""
    words = data.view("<u8")
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        moved = (words ^ words >> np.uint64(shift)) & np.uint64(mask)
        words = words ^ moved ^ moved << np.uint64(shift)
    return words.view(np.uint8)


def _keep_k(given: np.ndarray, out: np.ndarray) -> None:
    """Q4_K and Q5_K."""
    highest = []
    if given.shape[-1] == 176:
        by_block = _transposed(np.ascontiguousarray(given[:, 16:48])).reshape(-1, 4, 8).swapaxes(1, 2)
        highest = [_placed(_highest_bits(by_block.reshape(-1, 32)), UNITS[0])]
    pairs = _words(given[..., -128:]).reshape(len(given), 4, 8)
    q = np.stack((pairs & _NIBBLES, pairs >> np.uint32(4) & _NIBBLES), axis=2).reshape(len(given), 8, 8)
    np.concatenate((*_kept_scales(given), *highest, _bytes(_kept_nibbles(q))), axis=1, out=out)


def _keep_q6_k(given: np.ndarray, out: np.ndarray) -> None:
    count = len(given)
    low, high = _words(given[..., :128]).reshape(count, 2, 2, 8), _words(given[..., 128:192]).reshape(count, 2, 8)
    q = np.stack((low & _NIBBLES, low >> np.uint32(4) & _NIBBLES), axis=2).reshape(count, 8, 8)
    by_four = high.reshape(count, 2, 2, 4)  # [..., half, l // 8, group]
    packed = np.zeros((count, 4, 4), np.uint32)  # [..., group, l % 4]
    for quarter in range(4):  # lanes 4 * quarter + l % 4, of blocks 4 * (quarter % 2) + l % 4
        for lane in range(4):
            pair = by_four[:, quarter % 2, quarter // 2] >> np.uint32(2 * lane) & _PAIRS
            packed[..., lane] |= pair << np.uint32(2 * quarter)
    scales = given[..., 192:208].reshape(count, 8, 2).swapaxes(1, 2)
    by_group = np.concatenate((_kept_nibbles(q), np.ascontiguousarray(packed).view(np.uint8)), axis=2)
    np.concatenate((given[..., 208:], _bytes(scales), _bytes(by_group)), axis=1, out=out)


# From blocks in a file's order, [n, bytes], to memory's.
_KEEP: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    **dict.fromkeys(("Q4_K", "Q5_K"), _keep_k),
    "Q6_K": _keep_q6_k,
}

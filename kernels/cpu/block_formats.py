"""The blocks of integers with scales that weights are kept in, and their fp32 values: GGUF's, three of them with scales
in bf16, and rows of int8.

    Q8_0        w = d * (q - 128)           32 columns, q in 8 bits
    Q4_0, Q5_0  w = d * (q - 8), (q - 16)   32 columns, q in 4 and 5 bits
    Q4_1, Q5_1  w = d * q + m
    Q4_K, Q5_K  w = d * s * q - e * t       256 columns; s and t, 6 bits each, for 32 of them
    Q6_K        w = d * s * (q - 32)        256 columns, q in 6 bits; s, 8 bits, for 16 of them
    INT8        w = s * (q - 128)           a whole row, q in 8 bits; s in fp32
    BF16        w                           as it is: what has no integers, such as a table, in half the bytes of fp32

d, e and m are fp16; Q4_0_BF16, Q5_0_BF16 and Q8_0_BF16 are Q4_0, Q5_0 and Q8_0 with a d in bf16, for checkpoints that
have such. Every product of these formats is exact in fp32, and a difference is rounded once: the values of GGUF's are
those of `gguf.dequantize`, bit for bit. A product of INT8 is rounded to fp32.

In memory everything is in groups of 64 columns, two blocks of the formats that have 32, and q is unsigned (a file has
q - 128 in Q8_0, and so has INT8 before `kept`). The q of a group are in the order that products take them in: number
4 * l + j is that of column 32 * (l % 2) + 4 * (l // 2) + j, so that with four bytes a lane neighbouring lanes have
neighbouring scales.

    Q8_0        d of both blocks; 64 bytes
    Q4_0, Q4_1  d of both blocks, m of both; 32 bytes, whose lower halves are the first 32 of q
    Q5_0, Q5_1  d of both, m of both; 64 bits, which of q have their highest bit; the others as above
    Q4_K, Q5_K  d, e, eight s, eight t in a byte each; in Q5_K highest bits of the four groups; four times 32 bytes
    Q6_K        d, sixteen s; four times 32 bytes as above and 16 bytes of the upper two bits: byte i has those of
                numbers i, 16 + i, 32 + i and 48 + i, the lowest first
    INT8        s; 64 bytes of each group

That is as many bytes as in a file, but for the scales of Q4_K and Q5_K (144 bytes become 148, 176 become 180).

Source of the layouts in files: ggml's ggml-common.h and the `gguf` package's quants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

INT8, SCALE_BYTES = "INT8", 4
BF16 = "BF16"
_BF16 = f"_{BF16}"
COLUMNS = 64  # of a group; a matrix has a multiple of them


@dataclass(frozen=True)
class Format:
    """A kind of block.

    Args:
        name: as GGUF has it, or a name of this project's.
        stored_columns, stored_bytes: of a block in a file.
        halves_at: the bytes at which a block has fp16 numbers in a file.
        columns, bytes: of a block in memory.
    """

    name: str
    stored_columns: int
    stored_bytes: int
    halves_at: tuple[int, ...]
    columns: int
    bytes: int

    @property
    def is_row(self) -> bool:
        """Whether a block is a row of a matrix."""
        return self.name == INT8

    @property
    def has_bfloats(self) -> bool:
        """Whether its scales are bf16."""
        return self.name.endswith(_BF16)

    @property
    def layout(self) -> str:
        """The format of GGUF, or INT8, whose bytes are as its own are, whatever type the scales have."""
        return self.name.removesuffix(_BF16)


FORMATS = {
    form.name: form
    for form in (
        Format("Q8_0", 32, 34, (0,), 64, 68),
        Format("Q4_0", 32, 18, (0,), 64, 36),
        Format("Q4_1", 32, 20, (0, 2), 64, 40),
        Format("Q5_0", 32, 22, (0,), 64, 44),
        Format("Q5_1", 32, 24, (0, 2), 64, 48),
        Format("Q4_K", 256, 144, (0, 2), 256, 148),
        Format("Q5_K", 256, 176, (0, 2), 256, 180),
        Format("Q6_K", 256, 210, (208,), 256, 210),
    )
}
BFLOATS = Format(BF16, 1, 2, (), 1, 2)
BFLOAT_FORMATS = {f"{name}{_BF16}": replace(FORMATS[name], name=f"{name}{_BF16}") for name in ("Q4_0", "Q5_0", "Q8_0")}


def int8_rows(columns: int) -> Format:
    """The format of rows of so many columns with one scale each."""
    return Format(INT8, columns, SCALE_BYTES + columns, (), columns, SCALE_BYTES + columns)


def format_named(name: str, bytes_: int) -> Format:
    """The format of this name whose blocks have so many bytes in memory."""
    return int8_rows(bytes_ - SCALE_BYTES) if name == INT8 else (FORMATS | BFLOAT_FORMATS)[name]


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix, in one format: [rows, bytes of a row] uint8."""

    format: Format
    data: torch.Tensor = field(repr=False)


def kept(stored: np.ndarray, form: Format, out: np.ndarray | None = None) -> np.ndarray:
    """Blocks as they are in memory.

    Args:
        stored: [rows, bytes] uint8, blocks as a file has them, of a multiple of COLUMNS columns.
        form: their format.
        out: [rows, bytes] uint8, contiguous; overwritten. None for a new array.

    Returns:
        `out`.
    """
    bytes_ = form.columns // form.stored_columns * form.stored_bytes
    if out is None:
        out = np.empty(stored.size // bytes_ * form.bytes, np.uint8).reshape(len(stored), -1)
    _KEEP[form.layout](np.ascontiguousarray(stored).reshape(-1, bytes_), out.reshape(-1, form.bytes))
    return out


_NIBBLES = np.uint32(0x0F0F0F0F)
_PAIRS = np.uint32(0x03030303)


def _words(data: np.ndarray) -> np.ndarray:
    """[..., 4n] bytes as [..., n] uint32."""
    return np.ascontiguousarray(data).view("<u4")


def _bytes(words: np.ndarray) -> np.ndarray:
    """[n, ...] integers as [n, bytes]."""
    return np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)


def _numbers(data: np.ndarray, at: int, kind: str) -> np.ndarray:
    """The number at a byte of every row [n, bytes], aligned or not: a view [n]."""
    return np.ndarray(len(data), kind, data, at, data.strides[:1])


def _interleaved(words: np.ndarray) -> np.ndarray:
    """[n, 2, k]: the first of either, the second of either, ..."""
    return words.swapaxes(1, 2)


def _highest_bits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Highest bits of both blocks by column, [n] uint32 each, in the order of a group: [n] uint64."""
    wide = [each.astype(np.uint64) for each in (first, second)]
    for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)):
        wide = [(each | each << np.uint64(shift)) & np.uint64(mask) for each in wide]  # four bits stay together
    return wide[0] | wide[1] << np.uint64(4)


def _keep_int8(blocks: np.ndarray, out: np.ndarray) -> None:
    q = _words(blocks[:, SCALE_BYTES:]).reshape(len(blocks), -1, 2, COLUMNS // 8)
    np.concatenate((blocks[:, :SCALE_BYTES], _bytes(q.swapaxes(-2, -1)) ^ np.uint8(0x80)), axis=1, out=out)


def _keep_of_32(blocks: np.ndarray, out: np.ndarray) -> None:
    """Q4_0 to Q8_0. A number at a time of all blocks: several times faster than transposing them."""
    size = blocks.shape[1] // 2  # of a block, which is: fp16 numbers, highest bits, q
    q_bytes = 32 if size == 34 else 16
    q_at, to = size - q_bytes, out.shape[1] - 2 * q_bytes
    has_bits = size in (22, 24)
    for at in range(0, q_at - 4 * has_bits, 2):
        for block in range(2):
            _numbers(out, 2 * at + 2 * block, "<u2")[:] = _numbers(blocks, block * size + at, "<u2")
    if has_bits:
        first, second = (_numbers(blocks, block * size + q_at - 4, "<u4") for block in range(2))
        _numbers(out, to - 8, "<u8")[:] = _highest_bits(first, second)
    q = blocks ^ np.uint8(0x80) if size == 34 else blocks
    for at in range(0, q_bytes, 4):
        for block in range(2):
            _numbers(out, to + 2 * at + 4 * block, "<u4")[:] = _numbers(q, block * size + q_at + at, "<u4")


def _kept_scales(blocks: np.ndarray) -> list[np.ndarray]:
    """d, e, s and t of Q4_K and Q5_K."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = (low & 63, high & 15 | low >> 6 << 4)  # of the first four times 32 columns, and of the last
    minimums = (middle & 63, high >> 4 | middle >> 6 << 4)
    return [blocks[:, :4], *scales, *minimums]


def _kept_nibbles(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Values below 16 of the 32 columns of either half of a group, [n, 8] uint32, in its order: [n, 32] uint8."""
    return _bytes(_interleaved(np.stack([each[:, :4] | each[:, 4:] << np.uint32(4) for each in (first, second)], 1)))


def _keep_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """Q4_K and Q5_K."""
    highest = []
    if blocks.shape[1] == 176:
        by_column = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [n, 8, 32]
        words = np.packbits(by_column, axis=2, bitorder="little").view("<u4").reshape(len(blocks), 4, 2)
        highest = [_bytes(_highest_bits(words[:, group, 0], words[:, group, 1])) for group in range(4)]
    pairs = _words(blocks[:, -128:]).reshape(len(blocks), 4, 2, 4)
    low, high = (np.ascontiguousarray(pairs[:, :, half]) for half in range(2))  # of 16 columns of both blocks
    first = low & _NIBBLES | (high & _NIBBLES) << np.uint32(4)
    second = low >> np.uint32(4) & _NIBBLES | high & ~_NIBBLES
    q = _bytes(np.stack((first, second), axis=3))
    np.concatenate((*_kept_scales(blocks), *highest, q), axis=1, out=out)


def _keep_q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    low, high = _words(blocks[:, :128]).reshape(-1, 2, 2, 8), _words(blocks[:, 128:192]).reshape(-1, 2, 8)
    found = [blocks[:, 208:], blocks[:, 192:208]]
    for group in range(4):
        half, upper = divmod(group, 2)
        nibbles = low[:, half] >> np.uint32(4 * upper) & _NIBBLES  # [n, 2, 8]
        pairs = np.stack([high[:, half] >> np.uint32(4 * upper + 2 * block) & _PAIRS for block in range(2)], 1)
        by_lane = pairs.reshape(-1, 2, 4, 2).transpose(0, 2, 3, 1).reshape(-1, 4, 4)  # [n, lane // 4, lane % 4]
        packed = by_lane[:, 0]
        for quarter in range(1, 4):
            packed = packed | by_lane[:, quarter] << np.uint32(2 * quarter)
        found += [_kept_nibbles(nibbles[:, 0], nibbles[:, 1]), _bytes(packed)]
    np.concatenate(found, axis=1, out=out)


# Of as many stored blocks as make one in memory, [n, bytes], into those in memory, [n, bytes].
_KEEP: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"), _keep_of_32),
    **dict.fromkeys(("Q4_K", "Q5_K"), _keep_k),
    "Q6_K": _keep_q6_k,
    INT8: _keep_int8,
    BF16: lambda blocks, out: np.copyto(out, blocks),
}


def dequantized(data: np.ndarray, form: Format) -> np.ndarray:
    """The values of blocks.

    Args:
        data: [rows, bytes] uint8, whole blocks as they are in memory.
        form: their format.

    Returns:
        [rows, columns] fp32.
    """
    blocks = np.ascontiguousarray(data).reshape(-1, form.bytes)
    return _VALUES[form.name](blocks).reshape(len(data), -1)


def _halves(blocks: np.ndarray, at: int, count: int = 1) -> np.ndarray:
    """The fp16 from a byte of each block on, [blocks, count, 1] fp32."""
    return blocks[:, at : at + 2 * count].copy().view("<f2").astype(np.float32)[..., None]


def _bfloats(blocks: np.ndarray) -> np.ndarray:
    """The two bf16 that each block begins with, [blocks, 2, 1] fp32."""
    return (blocks[:, :4].copy().view("<u2").astype(np.uint32) << 16).view(np.float32)[..., None]


def _by_column(q: np.ndarray) -> np.ndarray:
    """[..., 64] in the order of a group as [..., 2, 32] by column."""
    return q.reshape(*q.shape[:-1], 8, 2, 4).swapaxes(-3, -2).reshape(*q.shape[:-1], 2, 32)


def _nibbles(data: np.ndarray, highest: np.ndarray | None = None) -> np.ndarray:
    """q [..., 2, 32] of [..., 32] bytes, with highest bits in [..., 8] bytes."""
    q = np.concatenate((data & 15, data >> 4), axis=-1)
    if highest is not None:
        q |= np.unpackbits(highest, axis=-1, bitorder="little") << 4
    return _by_column(q)


def _groups(blocks: np.ndarray) -> np.ndarray:
    """q of rows of int8, [rows, groups, 64]."""
    return blocks[:, SCALE_BYTES:].reshape(len(blocks), -1, COLUMNS)


def _signed(q: np.ndarray, zero: int) -> np.ndarray:
    return (q.astype(np.int16) - zero).astype(np.float32)


def _k(blocks: np.ndarray) -> np.ndarray:
    """Q4_K and Q5_K."""
    scales, minimums = (blocks[:, at : at + 8].astype(np.float32).reshape(-1, 4, 2, 1) for at in (4, 12))
    highest = blocks[:, 20:52].reshape(-1, 4, 8) if blocks.shape[1] == 180 else None
    q = _nibbles(blocks[:, -128:].reshape(-1, 4, 32), highest)
    return (_halves(blocks, 0)[..., None] * scales) * q - _halves(blocks, 2)[..., None] * minimums


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    groups = blocks[:, 18:].reshape(-1, 4, 48)
    low = np.concatenate((groups[..., :32] & 15, groups[..., :32] >> 4), axis=-1)
    high = groups[..., None, 32:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3  # [blocks, 4, 4, 16]
    q = _signed(_by_column(low | high.reshape(-1, 4, 64) << 4), 32)
    scales = _halves(blocks, 0)[:, 0] * blocks[:, 2:18].view(np.int8)  # [blocks, 16]
    return scales[..., None] * q.reshape(-1, 16, 16)


_VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of blocks [n, bytes], fp32
    "Q8_0": lambda b: _halves(b, 0, 2) * _signed(_by_column(b[:, 4:]), 128),
    "Q4_0": lambda b: _halves(b, 0, 2) * _signed(_nibbles(b[:, 4:]), 8),
    "Q4_1": lambda b: _halves(b, 0, 2) * _nibbles(b[:, 8:]) + _halves(b, 4, 2),
    "Q5_0": lambda b: _halves(b, 0, 2) * _signed(_nibbles(b[:, 12:], b[:, 4:12]), 16),
    "Q5_1": lambda b: _halves(b, 0, 2) * _nibbles(b[:, 16:], b[:, 8:16]) + _halves(b, 4, 2),
    "Q4_K": _k,
    "Q5_K": _k,
    "Q6_K": _q6_k,
    "Q8_0_BF16": lambda b: _bfloats(b) * _signed(_by_column(b[:, 4:]), 128),
    "Q4_0_BF16": lambda b: _bfloats(b) * _signed(_nibbles(b[:, 4:]), 8),
    "Q5_0_BF16": lambda b: _bfloats(b) * _signed(_nibbles(b[:, 12:], b[:, 4:12]), 16),
    BF16: lambda b: (b.copy().view("<u2").astype(np.uint32) << 16).view(np.float32),
    INT8: lambda b: b[:, :SCALE_BYTES].copy().view("<f4") * _signed(_by_column(_groups(b)), 128).reshape(len(b), -1),
}

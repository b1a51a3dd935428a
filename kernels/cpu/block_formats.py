"""The blocks of integers with scales that weights are kept in, and their exact fp32 values: GGUF's, and rows of int8.

    Q8_0        w = d * q                   32 columns, q in 8 bits
    Q4_0, Q5_0  w = d * (q - 8), (q - 16)   32 columns, q in 4 and 5 bits
    Q4_1, Q5_1  w = d * q + m
    Q4_K, Q5_K  w = d * s * q - e * t       256 columns; s and t, 6 bits each, for 32 of them
    Q6_K        w = d * s * (q - 32)        256 columns, q in 6 bits; s, 8 bits, for 16 of them
    INT8        w = s * q                   a whole row, q in 8 bits; s in fp32, before them

d, e and m are fp16. Every product of GGUF's formats is exact in fp32, and a difference is rounded once: the values are
those of `gguf.dequantize`, bit for bit, and those that compiled kernels multiply by. Bytes are as in the file, but for
the 6-bit scales of Q4_K and Q5_K, which are kept in 8 bits each (144 bytes become 148, 176 become 180). A product of
INT8 is rounded to fp32.

Source of the layouts: ggml's ggml-common.h and the `gguf` package's quants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

INT8, SCALE_BYTES = "INT8", 4
COLUMNS = 64  # compiled kernels read as many at a time: a matrix has a multiple of them


@dataclass(frozen=True)
class Format:
    """A kind of block: how many columns it has, its bytes in a file and as it is kept in memory, and at which bytes its
    fp16 numbers are in a file."""

    name: str
    columns: int
    stored_bytes: int
    bytes: int
    halves_at: tuple[int, ...]

    @property
    def has_packed_scales(self) -> bool:
        """Whether its scales are widened when it is read."""
        return self.bytes != self.stored_bytes

    @property
    def is_row(self) -> bool:
        """Whether a block is a row of a matrix."""
        return self.name == INT8


FORMATS = {
    name: Format(name, columns, stored, kept, halves_at)
    for name, columns, stored, kept, halves_at in (
        ("Q8_0", 32, 34, 34, (0,)),
        ("Q4_0", 32, 18, 18, (0,)),
        ("Q4_1", 32, 20, 20, (0, 2)),
        ("Q5_0", 32, 22, 22, (0,)),
        ("Q5_1", 32, 24, 24, (0, 2)),
        ("Q4_K", 256, 144, 148, (0, 2)),
        ("Q5_K", 256, 176, 180, (0, 2)),
        ("Q6_K", 256, 210, 210, (208,)),
    )
}


def int8_rows(columns: int) -> Format:
    """The format of rows of so many columns with one scale each."""
    return Format(INT8, columns, SCALE_BYTES + columns, SCALE_BYTES + columns, ())


def format_named(name: str, bytes_: int) -> Format:
    """The format of this name whose blocks are kept in so many bytes."""
    return int8_rows(bytes_ - SCALE_BYTES) if name == INT8 else FORMATS[name]


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix, in one format: [rows, bytes of a row] uint8."""

    format: Format
    data: torch.Tensor = field(repr=False)


def kept(stored: np.ndarray, form: Format) -> np.ndarray:
    """Blocks as they are kept in memory.

    Args:
        stored: [rows, bytes] uint8, whole blocks as a file has them.
        form: their format.
    """
    if not form.has_packed_scales:
        return stored
    blocks = stored.reshape(-1, form.stored_bytes)
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = (low & 63, high & 15 | low >> 6 << 4)  # of the first four groups of 32 columns, and of the last
    minimums = (middle & 63, high >> 4 | middle >> 6 << 4)
    wide = np.concatenate((blocks[:, :4], *scales, *minimums, blocks[:, 16:]), axis=1)
    return wide.reshape(len(stored), -1)


def dequantized(data: np.ndarray, form: Format) -> np.ndarray:
    """The values of blocks.

    Args:
        data: [rows, bytes] uint8, whole blocks as `kept` makes them.
        form: their format.

    Returns:
        [rows, columns] fp32.
    """
    blocks = np.ascontiguousarray(data).reshape(-1, form.bytes)
    return _VALUES[form.name](blocks).reshape(len(data), -1)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The fp16 at a byte of each block, [blocks, 1] fp32."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """[..., n] bytes as [..., 2n]: all lower halves, then all upper ones."""
    return np.concatenate((data & 15, data >> 4), axis=-1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """32 bits of each block from a byte on, [blocks, 32], as 0 or 16."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _signed(q: np.ndarray, zero: int) -> np.ndarray:
    return (q.astype(np.int16) - zero).astype(np.float32)


def _scaled(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """d * s * q - e * t for q [blocks, 8, 32]."""
    scales, minimums = (blocks[:, at : at + 8].astype(np.float32) for at in (4, 12))
    return (_halves(blocks, 0) * scales)[..., None] * q - (_halves(blocks, 2) * minimums)[..., None]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _scaled(blocks, _nibbles(blocks[:, 20:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks[:, 52:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = blocks[:, 20:52].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _scaled(blocks, q | fifth << 4)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))  # [blocks, 2, 128]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    q = _signed(low | high.reshape(-1, 2, 128) << 4, 32)
    scales = _halves(blocks, 208) * blocks[:, 192:208].view(np.int8)  # [blocks, 16]
    return scales[..., None] * q.reshape(-1, 16, 16)


_VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of blocks [n, bytes], fp32
    "Q8_0": lambda b: _halves(b, 0) * b[:, 2:].view(np.int8),
    "Q4_0": lambda b: _halves(b, 0) * _signed(_nibbles(b[:, 2:]), 8),
    "Q4_1": lambda b: _halves(b, 0) * _nibbles(b[:, 4:]) + _halves(b, 2),
    "Q5_0": lambda b: _halves(b, 0) * _signed(_nibbles(b[:, 6:]) | _fifth_bits(b, 2), 16),
    "Q5_1": lambda b: _halves(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b, 4)) + _halves(b, 2),
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    INT8: lambda b: b[:, :SCALE_BYTES].copy().view(np.float32) * b[:, SCALE_BYTES:].view(np.int8),
}

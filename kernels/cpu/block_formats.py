"""The blocks of integers with scales that weights are kept in, and their fp32 values: GGUF's formats, three of them
also with scales in bf16, and rows of int8.

    Q8_0        w = d * (q - 128)           32 columns, q in 8 bits
    Q4_0, Q5_0  w = d * (q - 8), (q - 16)   32 columns, q in 4 and 5 bits
    Q4_1, Q5_1  w = d * q + m
    Q4_K, Q5_K  w = d * s * q - e * t       256 columns; s and t, 6 bits each, for 32 of them
    Q6_K        w = d * s * (q - 32)        256 columns, q in 6 bits; s, 8 bits, for 16 of them
    INT8        w = s * (q - 128)           a whole row, q in 8 bits; s in fp32
    BF16        w                           as it is: what has no integers, such as a table, in half the bytes of fp32

d, e and m are fp16; Q4_0_BF16, Q5_0_BF16 and Q8_0_BF16 are Q4_0, Q5_0 and Q8_0 with a d in bf16, for checkpoints whose
scales are bf16. Every product is exact in fp32, except in INT8, where it is rounded, and a sum or difference is rounded
once: the values of GGUF's formats are those of `gguf.dequantize`, bit for bit.

In memory a row consists of units of four groups of 64 columns each and, for the remaining columns, at most one unit of
two groups and one of one. A unit of G groups has 2 G blocks of 32 columns. Its q are unsigned (a file has q - 128 in
Q8_0, and so has INT8 before `kept`) and stand in the order in which products take them, group after group: number 4 * l
+ j of group g is that of column

    32 * (l % 2G) + 4G * (l // 2G) + 4g + j          of the unit, for l < 16, j < 4

so that with four bytes a lane each lane has 4 G neighbouring columns of one block. A unit of G groups has

    Q8_0        d of all blocks; 64 bytes of each group
    Q4_0, Q4_1  d, m of all blocks; of each group 32 bytes, whose lower halves are the first 32 of q
    Q5_0, Q5_1  d, m of all; 64 G bits, which of q have their highest bit; the others as above
    Q4_K, Q5_K  (G = 4) d, e, eight s, eight t in a byte each; in Q5_K highest bits; four times 32 bytes
    Q6_K        (G = 4) d, sixteen s by lane; four times 32 bytes as above and 16 bytes of the upper two bits: byte i
                has those of numbers i, 16 + i, 32 + i and 48 + i, the lowest first
    INT8        64 bytes of each group, after the s of the row

Highest bits are in the order of q for a processor that takes them as masks (AVX-512); for others bit i of the 64 G is
bit i // 8G of byte i % 8G, so that a shift brings those of 8 G neighbours to their places.

That is as many bytes as in a file, but for the scales of Q4_K and Q5_K (144 bytes become 148, 176 become 180).

Source of the layouts in files: ggml's ggml-common.h and the `gguf` package's quants.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

INT8, SCALE_BYTES = "INT8", 4
BF16 = "BF16"
_BF16 = f"_{BF16}"
COLUMNS = 64  # of a group; a matrix has a multiple of them
LANES = COLUMNS // 4  # of a group, four columns each
UNITS = (4, 2, 1)  # groups of a unit; a row has any number of the first kind, then at most one of either other


@dataclass(frozen=True)
class Format:
    """A kind of block.

    Args:
        name: as GGUF has it, or a name of this project's.
        stored_columns, stored_bytes: of a block in a file.
        halves_at: the bytes at which a block has fp16 numbers in a file.
        columns, bytes: in memory, this many columns of a row take this many bytes.
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

    def unit_bytes(self, groups: int) -> int:
        """How many bytes a unit of so many groups has in memory, but for the scale of INT8."""
        return groups * COLUMNS if self.is_row else groups * COLUMNS * self.bytes // self.columns

    @property
    def has_bfloats(self) -> bool:
        """Whether its scales are bf16."""
        return self.name.endswith(_BF16)

    @property
    def layout(self) -> str:
        """The name of the GGUF format, or INT8, with the same layout of bytes, whatever the type of the scales."""
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


@dataclass(frozen=True)
class Units:
    """The units of a row that have the same number of groups."""

    groups: int  # of a unit
    count: int
    column: int  # of the first
    start: int  # of the first: its byte
    bytes: int  # of a unit

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.start + self.count * self.bytes

    def of(self, rows: Any) -> Any:
        """These units of rows [rows, bytes], a NumPy array or a tensor: a view [rows, units, bytes]."""
        return rows[:, self.start : self.end].reshape(len(rows), self.count, self.bytes)


def units_of(form: Format, columns: int) -> Iterator[Units]:
    """The units of a row of so many columns, one kind after the other."""
    column, start = 0, SCALE_BYTES if form.is_row else 0
    for groups in UNITS:
        count, size = (columns - column) // (groups * COLUMNS), form.unit_bytes(groups)
        if count:
            yield (found := Units(groups, count, column, start, size))
            column, start = column + count * groups * COLUMNS, found.end

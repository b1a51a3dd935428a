"""Matrices in blocks (block_formats.py) as compiled kernels take them: arrays of records, whose numba type tells the
format."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import models, register_model, typeof_impl
from numba.np.numpy_support import from_dtype

from runtime.kernels.cpu.block_formats import BFLOATS, Format, Part, format_named


class Records(np.ndarray):
    """An array of blocks, whose dtype tells compiled kernels its format."""


class Record(types.Record):
    """numba's type of a block. In the names of compiled functions numba puts a number in place of a record, counted
    within the process: two processes that keep code on disk could give two formats the same name, and linking would use
    one of them for both. So this type's name is written out."""

    @property
    def mangling_args(self) -> tuple[str, tuple[Any, ...]]:
        return self.name, ()


register_model(Record)(models.RecordModel)


@typeof_impl.register(Records)
def _typeof_records(array: Records, context: Any) -> types.Array:
    ((name, *_),) = array.dtype.descr
    field: Any = {"type": from_dtype(array.dtype[name]), "offset": 0}
    record = Record([(name, field)], array.dtype.itemsize, aligned=False)
    return types.Array(record, array.ndim, "C", aligned=array.flags.aligned)


def records(part: Part) -> np.ndarray:
    """A part as an array [rows, blocks]; bf16 as int16 [rows, columns], which arithmetic.py multiplies by fp32."""
    if part.format == BFLOATS:
        return part.data.numpy().view(np.int16)
    block = np.dtype([(part.format.name, np.uint8, part.format.bytes)])
    return part.data.numpy().view(block).view(Records)


def format_of(dtype: Any) -> Format | None:
    """The format of an array that `records` has made, by its numba dtype; None for any other."""
    return format_named(next(iter(dtype.fields)), dtype.size) if isinstance(dtype, Record) else None

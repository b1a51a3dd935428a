"""Random blocks of every format that a matrix is kept in."""

from __future__ import annotations

import numpy as np
import torch

from runtime.kernels.cpu.block_formats import BFLOAT_FORMATS, FORMATS, INT8, Part, int8_rows
from runtime.kernels.cpu.block_layout import kept
from runtime.kernels.quantized import QuantizedMatrix

ALL_FORMATS = FORMATS | BFLOAT_FORMATS
ROWS, COLUMNS = 37, 512
ALL_UNITS = 704  # columns: units of four groups, one of two and one of one
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where blocks have fp16


def most_units(name: str) -> int:
    """Columns of which a format has units of all kinds that it can have."""
    return COLUMNS if name.endswith("_K") else ALL_UNITS


def stored(name: str, seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Random blocks of a format, [rows, bytes], as a file has them: any bytes, with finite scales. Some scales are 0 or
    subnormal, some negative."""
    rng = np.random.default_rng(seed)
    form = ALL_FORMATS[name]
    raw = rng.integers(0, 256, (rows, columns // form.stored_columns * form.stored_bytes), dtype=np.uint8)
    blocks = raw.reshape(-1, form.stored_bytes)
    for at in HALVES.get(name, (0,)):
        if form.has_bfloats:
            scales = rng.choice([0.0, -0.0, 1e-40, -6e-5, 0.0123, -1.7, 3.1e4, 1e30], len(blocks)).astype(np.float32)
            halves = scales.view(np.uint16)[1::2].copy()
        else:
            halves = rng.choice([0.0, -0.0, 6e-8, -6e-5, 0.01, -1.7, 3.0, 65504.0], len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return raw


def int8(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Random rows of int8, [rows, bytes]; some scales are 0 or subnormal, some negative."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, int8_rows(columns).bytes), dtype=np.uint8)
    scales = rng.choice([0.0, -0.0, 1e-45, -3e-39, 0.0123, -1.7, 3.1e4, 1e30], rows).astype(np.float32)
    raw[:, :4] = scales[:, None].view(np.uint8)
    return raw


def matrix(name: str, seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> QuantizedMatrix:
    if name == INT8:
        form, raw = int8_rows(columns), int8(seed, rows, columns)
    else:
        form, raw = ALL_FORMATS[name], stored(name, seed, rows, columns)
    return QuantizedMatrix([Part(form, torch.from_numpy(kept(raw, form)))])

"""Matrices kept in blocks: their values are those of the gguf package, bit for bit, whole, in parts and row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.check.comparison import assert_as_exact
from runtime.kernels import linear
from runtime.kernels.cpu import availability
from runtime.kernels.cpu.block_formats import BFLOAT_FORMATS, FORMATS, INT8, Part, int8_rows
from runtime.kernels.cpu.block_layout import kept
from runtime.kernels.cpu.block_values import dequantized
from runtime.kernels.quantized import QuantizedMatrix, packed

from .stored_blocks import ALL_UNITS, COLUMNS, ROWS, int8, matrix, most_units, stored

gguf = pytest.importorskip("gguf", reason="needs the demo extra")


def expected(raw: np.ndarray, name: str) -> np.ndarray:
    values: np.ndarray = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
    return values


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_gguf(name: str, masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "takes_masks", lambda: masks)
    form, raw = FORMATS[name], stored(name, columns=most_units(name))
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (form.stored_columns, form.stored_bytes)
    values = dequantized(kept(raw, form), form)
    assert np.isfinite(values).all() and len(np.unique(values)) > 50
    np.testing.assert_array_equal(values.view(np.uint32), expected(raw, name).view(np.uint32))


@pytest.mark.parametrize("name", BFLOAT_FORMATS)
def test_values_with_scales_in_bf16_are_ggufs_times_them(name: str) -> None:
    """With 1 in place of d, what the gguf package decodes are the integers."""
    form, raw = BFLOAT_FORMATS[name], stored(name, columns=most_units(name))
    blocks = raw.copy().reshape(-1, form.stored_bytes)
    scales = torch.from_numpy(blocks[:, :2].copy()).view(torch.bfloat16).float().numpy()
    blocks[:, :2] = np.ones((1, 1), np.float16).view(np.uint8)
    integers = expected(blocks.reshape(raw.shape), form.layout)
    values = dequantized(kept(raw, form), form)
    products = (integers.reshape(-1, form.stored_columns).astype(np.float64) * scales).astype(np.float32)
    assert len(np.unique(values)) > 50 and len(np.unique(integers)) > 15
    np.testing.assert_array_equal(values.view(np.uint32), products.reshape(values.shape).view(np.uint32))


def test_rows_of_int8_are_a_scale_times_integers() -> None:
    raw = int8(columns=ALL_UNITS)
    expected = np.empty((ROWS, ALL_UNITS), np.float32)
    for row, given in zip(expected, raw, strict=True):
        scale = np.frombuffer(given.tobytes(), "<f4", 1)[0]
        row[:] = [np.float32(float(scale) * (int(q) - 256 * (q > 127))) for q in given[4:]]
    form = int8_rows(ALL_UNITS)
    values = dequantized(kept(raw, form), form)
    assert len(np.unique(values)) > 50
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(values[1:2], dequantized(kept(raw[1:2], form), form))
    table = matrix(INT8, columns=ALL_UNITS)
    assert (table.shape, table.formats, table.nbytes) == ((ROWS, ALL_UNITS), INT8, ROWS * (4 + ALL_UNITS))
    torch.testing.assert_close(table.rows(torch.tensor([3, 0])), torch.from_numpy(expected[[3, 0]]), rtol=0, atol=0)


def test_a_packed_matrix_has_the_rows_of_its_matrices() -> None:
    names = ["Q5_0", "Q5_0", "Q8_0", "Q6_K"]
    whole = packed([matrix(name, seed) for seed, name in enumerate(names)])
    values = torch.cat([torch.from_numpy(expected(stored(name, seed), name)) for seed, name in enumerate(names)])
    assert [part.format.name for part in whole.parts] == ["Q5_0", "Q8_0", "Q6_K"]
    assert whole.shape == values.shape and len(whole) == 4 * ROWS and whole.numel() == values.numel()
    assert whole.formats == "Q5_0 + Q8_0 + Q6_K"
    torch.testing.assert_close(whole.dequantized(), values, rtol=0, atol=0)
    ids = torch.tensor([[0, 3 * ROWS, 147], [ROWS, 2 * ROWS, 5]])
    torch.testing.assert_close(whole.rows(ids), values[ids], rtol=0, atol=0)
    sizes = [20, ROWS, 2 * ROWS, ROWS - 20]
    for part, rows in zip(whole.split(sizes), values.split(sizes), strict=True):
        torch.testing.assert_close(part.dequantized(), rows, rtol=0, atol=0)
    for part, rows in zip(whole.split(50), values.split(50), strict=True):
        torch.testing.assert_close(part.dequantized(), rows, rtol=0, atol=0)


def test_a_product_with_some_values_at_a_time_is_as_exact_as_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BLOCK_VALUES", 10 * COLUMNS)  # parts of ten outputs, one of them in two formats
    whole = packed([matrix("Q5_0"), matrix("Q6_K", 2, rows=11)])
    x, values = torch.randn(1, 45, COLUMNS), whole.dequantized()
    product, plain, truth = linear.linear_in_fp32(x, whole), x @ values.T, x.double() @ values.double().T
    for output in range(len(whole)):  # whose scales differ by orders of magnitude
        assert_as_exact(product[..., output], plain[..., output], truth[..., output])


def test_parts_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one width, got \[64, 512\] columns"):
        QuantizedMatrix([*matrix("Q8_0").parts, Part(FORMATS["Q8_0"], torch.zeros(3, 68, dtype=torch.uint8))])

"""Weights made into blocks: int8 against its formula, Q4_0 against the gguf package, and grids that come back."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from runtime.checkpoint.quantizing import REVISION, blocks_of, int8_rows_of, q4_0_of
from runtime.kernels.cpu.block_formats import FORMATS, int8_rows
from runtime.kernels.cpu.block_layout import kept
from runtime.kernels.cpu.block_values import dequantized

pytestmark = pytest.mark.newest_only  # about code of our own


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int8_values(values: torch.Tensor) -> np.ndarray:
    form = int8_rows(values.shape[1])
    return dequantized(kept(int8_rows_of(values).numpy(), form), form)


def q4_0_values(values: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(dequantized(kept(q4_0_of(values).numpy(), FORMATS["Q4_0"]), FORMATS["Q4_0"]))


def test_int8_is_the_nearest_multiple_of_a_rows_scale() -> None:
    values = normal(6, 128) * torch.tensor([1.0, 0.02, 3e4, 1e-30, 1e-43, 0.0])[:, None]
    values[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5])  # halves of a step, to even
    values[3, 7] = -values[3].abs().max() * 2
    expected = np.zeros(values.shape, np.float32)
    for row, given in zip(expected, values.numpy(), strict=True):
        scale = np.float32(max(map(abs, given)) / np.float32(127))
        steps = [0 if scale == 0 else max(-127, min(127, round(float(np.float32(w / scale))))) for w in given]
        row[:] = [np.float32(float(scale) * step) for step in steps]
    np.testing.assert_array_equal(int8_values(values), expected)
    assert expected[0, :6].tolist() == [127, 0, 2, 2, 0, -2] and expected[3, 7] == values[3, 7]
    error = np.abs(expected - values.numpy())
    bound = np.abs(values.numpy()).max(1) / 254
    assert (error.max(1)[:4] <= bound[:4] * (1 + 1e-6)).all() and error[4].max() < 1e-43 and not error[5].any()


def test_rows_of_int8_come_back() -> None:
    """Rows that reach 127 steps of a scale are those of their blocks."""
    steps = torch.randint(-127, 128, (50, 64), generator=torch.Generator().manual_seed(1)).float()
    steps[:, 0] = 127
    values = steps * (2.0 ** torch.arange(-20, 30))[:, None]
    assert torch.equal(torch.from_numpy(int8_values(values)), values)


def test_q4_0_is_llama_cpps_where_weights_are_on_no_grid() -> None:
    gguf = pytest.importorskip("gguf", reason="needs the demo extra")
    for values in (normal(16, 512), normal(16, 512).bfloat16().float() * 0.02, normal(16, 512).half().float()):
        values[3] = 0
        expected = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_0)
        np.testing.assert_array_equal(q4_0_of(values).numpy(), expected)


@pytest.mark.parametrize("reach", [(-8, 7), (-7, 7), (-6, 7), (-5, 6), (-5, 4), (-1, 1), (0, 2), (0, 0)], ids=str)
def test_a_grid_of_q4_0_comes_back(reach: tuple[int, int]) -> None:
    """Steps of any range, of scales of either sign; from the largest fp16 to subnormal ones."""
    steps = torch.randint(reach[0], reach[1] + 1, (512, 32), generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([1e-5, 0.003, 1.0, 8000.0]).repeat_interleave(128)[:, None]
    values = ((normal(512, 1) * sizes).half().float() * steps).view(64, -1)
    assert torch.equal(q4_0_values(values), values)


@pytest.mark.parametrize("reach", [(-8, 7), (-7, 7), (-5, 6), (-3, 3)], ids=str)
def test_a_grid_that_was_rounded_to_bf16_is_found(reach: tuple[int, int]) -> None:
    """As Google's QAT checkpoints are stored: scales in bf16, products rounded to bf16."""
    steps = torch.randint(reach[0], reach[1] + 1, (512, 32), generator=torch.Generator().manual_seed(3))
    scale = (normal(512, 1) * 0.003).clamp(min=2**-17).bfloat16().float()
    values = (scale * steps).bfloat16().float().view(64, -1)
    assert not torch.equal((scale * steps).view(64, -1), values)
    assert torch.equal(q4_0_values(values).bfloat16().float(), values)


def test_a_scale_beyond_fp16_is_refused() -> None:
    values = normal(2, 64)
    values[1, 3] = -65504 * 8
    assert q4_0_values(values)[1, 3] == values[1, 3]
    values[1, 3] *= 1.01
    with pytest.raises(OverflowError, match=r"a group's scale must be at most 65504, got 66159"):
        q4_0_of(values)


def test_a_row_whose_values_would_overflow_is_refused() -> None:
    """127 of a scale that was rounded up are beyond fp32 where the row's largest weight is the largest of fp32."""
    largest = torch.finfo(torch.float32).max
    values = normal(2, 64)
    values[1, 3] = -largest * (1 - 2**-23)
    assert np.isfinite(int8_values(values)).all()
    values[1, 3] = -largest
    with pytest.raises(OverflowError, match=r"127 of a row's scale must be a number of fp32, got a scale of 2\.679"):
        int8_rows_of(values)


def test_the_cache_has_what_is_written_here() -> None:
    """Models that an earlier version quantised must not be found in the cache: raise REVISION with these."""
    values = (torch.arange(-4096, 4096).view(64, 128).double() ** 3 % 1009 - 504).float() / 4096
    values[8:] = values[8:].bfloat16().float() * 2.0 ** (torch.arange(56) - 40)[:, None]
    values[:4] = (values[:4] * 40).round() * 0.125  # a grid
    written = [kept(blocks_of(values, form).numpy(), form) for form in (int8_rows(128), FORMATS["Q4_0"])]
    digests = [hashlib.sha256(blocks.tobytes()).hexdigest()[:16] for blocks in written]
    assert (REVISION, digests) == (2, ["8cbb565c98e94524", "cdb30d4bf43fc51e"])

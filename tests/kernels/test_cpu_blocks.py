"""Matrices in blocks in the compiled CPU kernels: every result has the bits that fp32 weights of their values give."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from runtime.kernels.cpu.block_formats import FORMATS, INT8
from runtime.kernels.cpu.calls import captured, missing, run
from runtime.kernels.ops import Ops
from runtime.kernels.quantized import Matrix, QuantizedMatrix, packed

from .stored_blocks import COLUMNS, ROWS, matrix

if reason := missing(torch.float32):
    pytest.skip(reason, allow_module_level=True)

from numba import njit

from runtime.kernels.cpu import blocks
from runtime.kernels.cpu.arithmetic import dot_products
from runtime.kernels.cpu.panels import panels_of, products


@njit
def values_of(out, weight):  # type: ignore[no-untyped-def]
    for row in range(len(out)):
        blocks.dequantize_row(out, row, weight, row)


def activations(rows: int, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("name", [*FORMATS, INT8])
def test_values_and_products_are_those_of_fp32_weights(name: str) -> None:
    """Few rows, panels of rows, and rows beside others."""
    whole = matrix(name)
    weights, values = blocks.records(whole.parts[0]), whole.dequantized().numpy()
    out = np.empty_like(values)
    values_of(out, weights)
    np.testing.assert_array_equal(out.view(np.uint32), values.view(np.uint32))
    for rows in (1, 3, 8, 13):
        x = activations(rows).numpy()
        sums, expected = (np.full((ROWS, rows), np.nan, np.float32) for _ in range(2))
        products(sums, ROWS, weights, 0, x, panels_of(x, weights))
        dot_products(expected, ROWS, values, 0, x)
        np.testing.assert_array_equal(sums.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q5_K"])
def test_processors_without_the_instructions_have_the_same_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_features", frozenset)

    @njit
    def values_without(out, weight):  # type: ignore[no-untyped-def]
        for row in range(len(out)):
            blocks.dequantize_row(out, row, weight, row)

    whole = matrix(name, rows=9)
    values = whole.dequantized().numpy()
    out = np.empty_like(values)
    values_without(out, blocks.records(whole.parts[0]))
    np.testing.assert_array_equal(out.view(np.uint32), values.view(np.uint32))


def both(step: Callable[[Ops, Matrix], dict[str, torch.Tensor]], weight: QuantizedMatrix, threads: int) -> None:
    """A step with blocks, and with their values: the same bits in all that it writes."""
    results = []
    for given in (weight, weight.dequantized()):
        written: dict[str, torch.Tensor] = {}
        run(captured(lambda ops, given=given, written=written: written.update(step(ops, given))), threads)  # type: ignore[misc]
        results.append(written)
    for name, value in results[1].items():
        assert not value.is_floating_point() or (value.isfinite().all() and value.any()), name
        torch.testing.assert_close(results[0][name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "threads"), [(1, 2), (8, 1)])
def test_operations_take_them(rows: int, threads: int) -> None:
    x, norm = activations(rows), activations(1)[0] / 8

    def empty(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan)

    def qkv(ops: Ops, weight: Matrix) -> dict[str, torch.Tensor]:
        out = empty(rows, len(weight))
        ops.qkv_projection(out, x, norm, weight, eps=1e-6)
        return {"out": out}

    both(qkv, packed([matrix("Q5_0"), matrix("Q8_0", 1), matrix("Q6_K", 2)]), threads)

    def mlp(ops: Ops, weight: Matrix) -> dict[str, torch.Tensor]:
        out = empty(rows, len(weight) // 2)
        ops.gated_mlp(out, x, norm, weight, eps=1e-6)
        return {"out": out}

    both(mlp, packed([matrix("Q5_0"), matrix("Q8_0", 1)]), threads)

    def down(ops: Ops, weight: Matrix) -> dict[str, torch.Tensor]:
        out = empty(rows, len(weight))
        ops.residual_linear(out, x, weight, residual=x[:, : len(weight)].contiguous())
        return {"out": out}

    both(down, matrix("Q8_0"), threads)

    def head(ops: Ops, table: Matrix) -> dict[str, torch.Tensor]:
        token, logits = torch.full((rows,), -1), empty(rows, len(table))
        ops.lm_head_argmax(token, x, norm, table, logits=logits, eps=1e-6, softcap=30.0)
        return {"token": token, "logits": logits}

    both(head, matrix(INT8), threads)

    def end(ops: Ops, table: Matrix) -> dict[str, torch.Tensor]:
        embedded = empty(rows, COLUMNS)
        ops.advance(
            torch.arange(rows) + 3,
            embedded,
            torch.zeros(rows, dtype=torch.int32),
            torch.zeros(rows, dtype=torch.bool),
            torch.zeros(4, rows, dtype=torch.int64),
            torch.zeros(rows, dtype=torch.int64),
            table,
            torch.full((rows, 1), -5),
            torch.full((rows,), 99, dtype=torch.int32),
            embed_scale=22.6,
            pad=0,
        )
        return {"x": embedded}

    both(end, matrix(INT8), threads)


def test_other_activations_and_widths_are_refused() -> None:
    out, norm = torch.empty(1, ROWS, dtype=torch.bfloat16), torch.zeros(COLUMNS, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"weight: expected x of dtype torch.float32 .* in blocks, got torch.bfloat16"):
        captured(lambda ops: ops.qkv_projection(out, activations(1).bfloat16(), norm, matrix("Q8_0"), eps=1e-6))
    with pytest.raises(
        ValueError, match=r"weight: expected a matrix \[outputs, 64\] on cpu, got QuantizedMatrix\(\[37, 512\]"
    ):
        captured(lambda ops: ops.residual_linear(torch.empty(1, ROWS), activations(1, 64), matrix("Q8_0")))

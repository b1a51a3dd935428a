"""Matrices in blocks in the compiled CPU kernels: their values exactly, products as near to the truth as fp32 products
of PyTorch, with the same bits for any number of rows and on every processor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from runtime.check.comparison import Mismatch, assert_as_exact, rms
from runtime.kernels.cpu.block_formats import BFLOATS, FORMATS, INT8, Part, Units, units_of
from runtime.kernels.cpu.block_layout import kept
from runtime.kernels.cpu.block_values import dequantized
from runtime.kernels.cpu.calls import captured, missing, run
from runtime.kernels.ops import Ops, TorchOps
from runtime.kernels.quantized import Matrix, QuantizedMatrix, packed

from .stored_blocks import ALL_FORMATS, ALL_UNITS, COLUMNS, ROWS, matrix, most_units, stored

if reason := missing(torch.float32):
    pytest.skip(reason, allow_module_level=True)

from llvmlite import ir
from numba import njit, typeof
from numba.core.itanium_mangler import mangle_type

from runtime.kernels.cpu import availability, block_products, blocks, digits, fixed_point, vectors
from runtime.kernels.cpu.arithmetic import operand
from runtime.kernels.cpu.panels import panels_of, products
from runtime.kernels.cpu.records import records

pytestmark = pytest.mark.newest_only  # what compiles these kernels is the same with the oldest

GREATEST = 8355711  # three digits of 127


@njit
def values_of(out, weight):  # type: ignore[no-untyped-def]
    for row in range(len(out)):
        blocks.dequantize_row(out, row, weight, row)


@njit
def multiplied(sums, count, weight, first, x):  # type: ignore[no-untyped-def]
    """sums [count, rows] of outputs from `first` on."""
    factors, of_rows = operand(x, weight), np.full((len(x), count + 2), np.nan, np.float32)
    products(of_rows, 1, count, weight, first, factors, panels_of(factors, weight))
    sums[:] = of_rows[:, 1 : count + 1].T


def activations(rows: int, columns: int = COLUMNS) -> torch.Tensor:
    """Of different sizes in different places."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 2, columns)


def all_units(name: str, rows: int = ROWS) -> QuantizedMatrix:
    return matrix(name, rows=rows, columns=most_units(name))


def sums_of(name: str, rows: int, count: int = ROWS) -> np.ndarray:
    sums = np.full((count, rows), np.nan, np.float32)
    x = activations(13, most_units(name))[:rows].numpy()
    multiplied(sums, count, records(all_units(name).parts[0]), ROWS - count, x)
    return sums


def without_minimums(name: str) -> torch.Tensor:
    """The values of `matrix` with its minimums 0."""
    if name == INT8:
        return all_units(name).dequantized()
    form, raw = ALL_FORMATS[name], stored(name, columns=most_units(name))
    if len(form.halves_at) == 2:
        raw.reshape(-1, form.stored_bytes)[:, form.halves_at[1] :][:, :2] = 0
    return torch.from_numpy(dequantized(kept(raw, form), form))


# Q5_0_BF16 has all of the code that is its like's.
LIKE_OTHERS = [pytest.param(name, marks=pytest.mark.sweep) for name in ("Q4_0_BF16", "Q8_0_BF16")]


@pytest.mark.parametrize("name", [*FORMATS, "Q5_0_BF16", INT8, *LIKE_OTHERS])
def test_values_and_products(name: str) -> None:
    whole = all_units(name)
    values, x = whole.dequantized(), activations(13, most_units(name))
    out = np.empty(values.shape, np.float32)
    values_of(out, records(whole.parts[0]))
    np.testing.assert_array_equal(out.view(np.uint32), values.numpy().view(np.uint32))
    sums = sums_of(name, 13)
    plain, truth, scaled = values @ x.T, values.double() @ x.double().T, without_minimums(name) @ x.T
    for output in range(ROWS):  # whose scales differ by orders of magnitude
        magnitude = scaled[output].abs().max().item()  # less the minimums', which may be as large
        assert_as_exact(torch.from_numpy(sums)[output], plain[output], truth[output], magnitude=magnitude)
    for rows in (1, 2, 3, 8, 12):  # 12 in more than one panel
        np.testing.assert_array_equal(sums_of(name, rows).view(np.uint32), sums[:, :rows].view(np.uint32))
    for count in (1, 3, 6):  # fewer than a tile of outputs, and not a multiple of it
        np.testing.assert_array_equal(sums_of(name, 2, count), sums[-count:, :2])


def bfloats(columns: int) -> QuantizedMatrix:
    values = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(7)).bfloat16()
    return QuantizedMatrix([Part(BFLOATS, values.view(torch.uint8))])


def test_bf16_is_multiplied_by_activations_in_fp32() -> None:
    """Which no bf16 would hold; in rows whose last columns are no whole block."""
    whole = bfloats(470)
    values, x = whole.dequantized(), activations(13, 470)
    assert torch.equal(values, whole.parts[0].data.view(torch.bfloat16).float())
    assert torch.equal(whole.rows(torch.tensor([5, 0])), values[[5, 0]]) and whole.nbytes == 2 * values.numel()
    weight = records(whole.parts[0])
    sums = np.full((ROWS, 13), np.nan, np.float32)
    multiplied(sums, ROWS, weight, 0, x.numpy())
    plain, truth = values @ x.T, values.double() @ x.double().T
    for output in range(ROWS):
        assert_as_exact(torch.from_numpy(sums)[output], plain[output], truth[output])
    with pytest.raises(Mismatch):  # what rounding them would give
        assert_as_exact(values @ x.bfloat16().float().T, plain, truth)
    for rows in (1, 2, 3, 8):
        some = np.full((ROWS, rows), np.nan, np.float32)
        multiplied(some, ROWS, weight, 0, x[:rows].numpy())
        np.testing.assert_array_equal(some.view(np.uint32), sums[:, :rows].view(np.uint32))


def with_emulated_vnni(function: Callable[..., Any]) -> Callable[..., Any]:
    """`Arguments.function` with the one instruction of AVX-512 that is called by name written out."""

    def found(args: Any, name: str, result: Any, *takes: Any) -> Any:
        if name != "llvm.x86.avx512.vpdpbusd.512":
            return function(args, name, result, *takes)
        if "emulated" not in args.builder.module.globals:
            emulated = ir.Function(args.builder.module, ir.FunctionType(result, takes), "emulated")
            emulated.linkage = "internal"
            builder = ir.IRBuilder(emulated.append_basic_block())
            total, *factors = emulated.args
            wide = ir.VectorType(ir.IntType(32), 64)
            unsigned, signed = (builder.bitcast(factor, blocks.BYTES) for factor in factors)
            products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
            for first in range(4):
                total = builder.add(total, vectors.shuffled(builder, products, products, range(first, 64, 4)))
            builder.ret(total)
        return args.builder.module.globals["emulated"]

    return found


PROCESSORS = {"AVX2": {"+avx2"}, "none": set(), "VNNI": {"+avx512vnni"}}


@pytest.mark.parametrize("name", [*FORMATS, "Q5_0_BF16", INT8])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_processor_has_the_same_bits(name: str, processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = PROCESSORS[processor]
    if processor != "AVX2" and name not in ("Q4_K", "Q5_0", "Q6_K", "Q8_0"):
        pytest.skip("four formats have all that depends on it: 4, 5, 6 and 8 bits, and minimums")
    whole, x = all_units(name, rows=8), activations(3, most_units(name)).numpy()
    weights, expected = records(whole.parts[0]), np.empty((8, 3), np.float32)
    multiplied(expected, 8, weights, 0, x)
    expected_values, numbers = whole.dequantized().numpy(), numbers_of(x, fixed_point.fixed_point(x))
    # Only now, as for the faults below: what was compiled so far is kept on disk.
    monkeypatch.setattr(availability, "takes_masks", lambda: processor == "VNNI")
    weights = records(all_units(name, rows=8).parts[0])
    monkeypatch.setattr(vectors.Arguments, "function", with_emulated_vnni(vectors.Arguments.function))
    for module in (blocks, digits):
        monkeypatch.setattr(module, "processor_features", lambda: features)
    factors = cache_aligned(3, sum(kind.count * 16 * fixed_point.unit_vectors(kind.groups) for kind in units(x)))

    @njit
    def multiplied_here(sums, values, factors, weight, x):  # type: ignore[no-untyped-def]
        for row in range(len(x)):
            fixed_point.store_row(factors, x, row)
        for output in range(0, len(weight), 2):
            block_products.block_tile(sums, output, weight, output, factors, 0, 2, 2)
            block_products.block_tile(sums, output, weight, output, factors, 2, 2, 1)
        for row in range(len(values)):
            blocks.dequantize_row(values, row, weight, row)

    sums, values = np.empty((3, 8), np.float32), np.empty_like(expected_values)
    multiplied_here(sums, values, factors, weights, x)
    for here, there in zip(numbers_of(x, factors), numbers, strict=True):
        np.testing.assert_array_equal(here, there)
    np.testing.assert_array_equal(sums.view(np.uint32).T, expected.view(np.uint32))
    np.testing.assert_array_equal(values.view(np.uint32), expected_values.view(np.uint32))


def test_sums_of_more_than_24_bits_are_rounded_once() -> None:
    """The lower digits' sum is odd and has 25 bits; less what the highest add, the total has 16."""
    q, n = np.zeros((1, 256), np.int8), np.zeros((1, 256), np.int64)
    n[0, :16] = [*range(32252, 32260), *[100 * 65536] * 8]
    q[0, :16] = [127] * 7 + [126] + [-1] * 5 + [0] * 3
    low, total = int(q[0, :8] @ n[0, :8]), int(q[0] @ n[0])
    assert low % 2 and low > 2**24 and abs(total) < 2**16
    raw = np.concatenate((np.ones((8, 1), np.float16).view(np.uint8), q.reshape(8, 32).view(np.uint8)), axis=1)
    weight = Part(FORMATS["Q8_0"], torch.from_numpy(kept(raw.reshape(1, -1), FORMATS["Q8_0"])))
    sums = np.empty((1, 1), np.float32)
    multiplied(sums, 1, records(weight), 0, n.astype(np.float32))
    assert sums[0, 0] == total


@pytest.mark.parametrize(("name", "q"), [("Q4_0", 7), ("Q5_0", 15), ("Q6_K", -31)])
def test_the_greatest_products_fit(name: str, q: int) -> None:
    """In the bits in which they are added first: all numbers have their greatest q and digits of -128."""
    form = FORMATS[name]
    raw = np.full((256 // form.stored_columns, form.stored_bytes), 255, np.uint8)
    raw[:, form.halves_at[0] :][:, :2] = np.ones((1, 1), np.float16).view(np.uint8)
    weight = Part(form, torch.from_numpy(kept(raw.reshape(1, -1), form)))
    n, sums = 100 * 65536 - 128 * 256 - 128, np.empty((1, 1), np.float32)
    multiplied(sums, 1, records(weight), 0, np.full((1, 256), n, np.float32))
    assert sums[0, 0] == 256 * q * n


def test_a_compiled_function_s_name_tells_formats_apart_in_every_process() -> None:
    """numba's own numbers for types, counted within a process, do not."""
    kinds = [typeof(records(matrix(name).parts[0])) for name in (*ALL_FORMATS, INT8)]
    names = [mangle_type(kind) for kind in kinds]
    assert len(set(names)) == len(names)
    assert not any(f"Li{kind.dtype._code}E" in name for kind, name in zip(kinds, names, strict=True))


def units(x: np.ndarray) -> list[Units]:
    return list(units_of(FORMATS["Q8_0"], x.shape[1]))


def cache_aligned(rows: int, words: int) -> np.ndarray:
    memory = np.full(rows * words + 16, np.nan, np.float32)
    skipped = -memory.ctypes.data % 64 // 4
    return memory[skipped:][: rows * words].reshape(rows, words)


def numbers_of(x: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """n and step by column [rows, columns], from the vectors that are documented."""
    rows = len(x)
    vectors = factors.reshape(rows, -1, 16)
    every_n, steps, at = np.zeros((len(digits.all_digits()), *x.shape), np.int64), np.zeros(x.shape), 0
    for some in units(x):
        groups = some.groups
        lanes = np.array([[group * 64 + 4 * lane for lane in range(16)] for group in range(groups)])[..., None]
        numbers = (lanes + np.arange(4)).reshape(-1)  # of q, in the order of a unit
        lane = numbers % 64 // 4
        within = 32 * (lane % (2 * groups)) + 4 * groups * (lane // (2 * groups)) + 4 * (numbers // 64) + numbers % 4
        for first in range(some.column, some.column + some.count * groups * 64, groups * 64):
            unit = vectors[:, at : at + fixed_point.unit_vectors(groups)]
            for n, kind in zip(every_n, digits.all_digits(), strict=True):
                type_, weights = (np.int8, [65536, 256, 1]) if kind.vectors == 1 else (np.int16, [65536, 1])
                start, end = fixed_point.digits_at(kind, groups), fixed_point.sums_at(kind, groups)
                # A lane's columns are in one vector, or 0 and 2 in one and 1 and 3 in another.
                found = unit[:, start:end].copy().view(type_)
                found = found.reshape(rows, kind.per_number, groups, kind.vectors, 16, 4 // kind.vectors).astype(int)
                found = found.transpose(0, 1, 2, 4, 5, 3).reshape(rows, kind.per_number, groups, 16, 4)
                high, *rest = (
                    digit * weight for digit, weight in zip(found.sum(axis=(2, 4)).swapaxes(0, 1), weights, strict=True)
                )
                minus_sums = unit[:, end : end + 2].copy().view(np.int32)
                np.testing.assert_array_equal(minus_sums[:, 0], -high // 65536)
                np.testing.assert_array_equal(minus_sums[:, 1], -sum(rest))
                n[:, first + within] = np.tensordot(found, weights, ([1], [0])).reshape(rows, -1)
            steps[:, first + within] = unit[:, -1, lane]
            at += fixed_point.unit_vectors(groups)
    for n in every_n[1:]:
        np.testing.assert_array_equal(n, every_n[0])
    return every_n[0], steps


def test_activations_become_the_nearest_multiples_of_a_step() -> None:
    x = activations(4, ALL_UNITS).numpy()
    x[0, :32], x[1, 64:96], x[1, 640:672] = 0, 1e-42, -1e-42
    x[2, 32:64] = np.nextafter(np.float32(2), np.float32(0))  # would need a fourth digit at half the step
    x[2, 33:49], x[3, 0], x[3, 41], x[3, 520], x[3, 700] = -x[2, 33:49], 3e38, 900, 77, -1e5
    n, step = numbers_of(x, fixed_point.fixed_point(x))
    lanes = np.r_[np.full(32, 16), np.full(16, 8), np.full(16, 4)]  # columns of each lane
    firsts = np.cumsum(lanes) - lanes
    greatest = np.maximum.reduceat(np.abs(x.astype(np.float64)), firsts, axis=1).repeat(lanes, axis=1)
    assert np.abs(n).max() <= GREATEST and (np.abs(n * step - x.astype(np.float64)) <= step / 2).all()
    normal = greatest > 2.0**-96
    assert (step[normal] < greatest[normal] / (GREATEST / 2 - 1)).all()  # the least that will do


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = activations(2).numpy()
    x[1, 77] = bad
    sums = np.empty((ROWS, 2), np.float32)
    multiplied(sums, ROWS, records(matrix("Q8_0").parts[0]), 0, x)
    assert np.isfinite(sums[:, 0]).all() and np.isnan(sums[:, 1]).all()


def test_sums_are_about_as_near_to_the_truth_as_pytorchs() -> None:
    """Nearer, but for outliers, whose 15 neighbours have the step of the outlier."""
    random = torch.Generator().manual_seed(3)
    weights = torch.randint(-127, 128, (64, 16, 32), dtype=torch.int8, generator=random).numpy()
    scales = np.full((64, 16, 1), 0.01, np.float16).view(np.uint8)
    raw = np.concatenate((scales, weights.view(np.uint8)), axis=2).reshape(64, -1)
    data = kept(raw, FORMATS["Q8_0"])
    values = torch.from_numpy(dequantized(data, FORMATS["Q8_0"]))
    for outlier, limit in ((1, 0.7), (30, 1.25), (3000, 1.25)):
        x = torch.randn(13, COLUMNS, generator=random)
        x[:, torch.randperm(COLUMNS, generator=random)[:6]] *= outlier
        sums = np.empty((64, 13), np.float32)
        multiplied(sums, 64, records(Part(FORMATS["Q8_0"], torch.from_numpy(data))), 0, x.numpy())
        truth = values.double() @ x.double().T
        assert rms(torch.from_numpy(sums) - truth) < limit * rms(values @ x.T - truth)


def without_faults(builder: Any, weights: blocks.Weights) -> blocks.Weights:
    return weights


FAULTS: dict[str, tuple[str, Callable[[Any, blocks.Weights], blocks.Weights]]] = {
    "halves of bytes swapped": (
        "Q4_0",
        lambda builder, weights: weights._replace(
            q=[vectors.shuffled(builder, q, q, [*range(32, 64), *range(32)]) for q in weights.q]
        ),
    ),
    "scale of the neighbouring block": (
        "Q8_0",
        lambda builder, weights: weights._replace(
            scale=vectors.shuffled(builder, weights.scale, weights.scale, [lane ^ 1 for lane in range(16)])
        ),
    ),
    "minimum twice": (
        "Q4_K",
        lambda builder, weights: weights._replace(minimum=builder.fadd(weights.minimum, weights.minimum)),
    ),
    "zero off by one": (
        "Q6_K",
        lambda builder, weights: weights._replace(q=[builder.add(q, vectors.each(1, blocks.BYTES)) for q in weights.q]),
    ),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_refused(fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changed = FAULTS[fault] if fault else ("Q6_K", without_faults)
    whole, x = matrix(name, rows=4), activations(1)
    # What is compiled below has to be the tests' own: other code is kept on disk.
    values, factors = whole.dequantized(), fixed_point.fixed_point(x.numpy())
    read = blocks.Blocks.weights
    monkeypatch.setattr(
        blocks.Blocks, "weights", lambda self, row, index: changed(self._builder, read(self, row, index))
    )

    @njit
    def multiplied_here(sums, weight, factors):  # type: ignore[no-untyped-def]
        for output in range(0, len(weight), 2):
            block_products.block_tile(sums, output, weight, output, factors, 0, 2, 1)

    sums = np.empty((1, 4), np.float32)
    multiplied_here(sums, records(whole.parts[0]), factors)
    with pytest.raises(Mismatch) if fault else nullcontext():
        assert_as_exact(torch.from_numpy(sums.T), values @ x.T, values.double() @ x.double().T)


def compare(step: Callable[[Ops, Matrix, torch.dtype], torch.Tensor], weight: QuantizedMatrix, threads: int) -> None:
    """A step on blocks against plain PyTorch on their values, in fp32 and in fp64."""
    written: list[torch.Tensor] = []
    run(captured(lambda ops: written.append(step(ops, weight, torch.float32))), threads)
    values = weight.dequantized()
    plain = step(TorchOps(), values, torch.float32)
    assert_as_exact(written[0], plain, step(TorchOps(), values.double(), torch.float64))


@pytest.mark.parametrize(("rows", "threads"), [(1, 2), (8, 1)])
def test_operations_take_them(rows: int, threads: int) -> None:
    x32, norm32 = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows)), activations(1)[0] / 900

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    def qkv(ops: Ops, weight: Matrix, dtype: torch.dtype) -> torch.Tensor:
        out = empty(rows, len(weight), dtype=dtype)
        ops.qkv_projection(out, x32.to(dtype), norm32.to(dtype), weight, eps=1e-6)
        return out

    compare(qkv, packed([matrix("Q5_0"), matrix("Q8_0", 1), matrix("Q6_K", 2)]), threads)

    def mlp(ops: Ops, weight: Matrix, dtype: torch.dtype) -> torch.Tensor:
        out = empty(rows, len(weight) // 2, dtype=dtype)
        ops.gated_mlp(out, x32.to(dtype), norm32.to(dtype), weight, eps=1e-6)
        return out

    compare(mlp, packed([matrix("Q5_0"), matrix("Q8_0", 1)]), threads)

    def down(ops: Ops, weight: Matrix, dtype: torch.dtype) -> torch.Tensor:
        out, x = empty(rows, len(weight), dtype=dtype), x32.to(dtype)
        ops.residual_linear(out, x, weight, residual=x[:, : len(weight)].contiguous())
        return out

    compare(down, matrix("Q8_0"), threads)

    def head(ops: Ops, table: Matrix, dtype: torch.dtype) -> torch.Tensor:
        token, logits = torch.full((rows,), -1), empty(rows, len(table), dtype=dtype)
        ops.lm_head_argmax(token, x32.to(dtype), norm32.to(dtype), table, logits=logits, eps=1e-6, softcap=30.0)
        return logits

    compare(head, matrix(INT8), threads)
    compare(head, bfloats(COLUMNS), threads)

    def end(ops: Ops, table: Matrix, dtype: torch.dtype) -> torch.Tensor:
        embedded = empty(rows, COLUMNS, dtype=dtype)
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
        return embedded

    compare(end, matrix(INT8), threads)
    compare(end, bfloats(COLUMNS), threads)


def test_other_activations_and_widths_are_refused() -> None:
    out, norm = torch.empty(1, ROWS, dtype=torch.bfloat16), torch.zeros(COLUMNS, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"weight: expected x of dtype torch.float32 .* in blocks, got torch.bfloat16"):
        captured(lambda ops: ops.qkv_projection(out, activations(1).bfloat16(), norm, matrix("Q8_0"), eps=1e-6))
    with pytest.raises(
        ValueError, match=r"weight: expected a matrix \[outputs, 64\] on cpu, got QuantizedMatrix\(\[37, 512\]"
    ):
        captured(lambda ops: ops.residual_linear(torch.empty(1, ROWS), activations(1, 64), matrix("Q8_0")))

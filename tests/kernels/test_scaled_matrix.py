"""Matrices of integers with scales: their values, what is refused, and the assembly that widens integers on a GPU, run
here instruction by instruction."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import runtime.kernels as kernels
from runtime.kernels import integers
from runtime.kernels.block import Block, block_for, block_key
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.cpu.block_formats import FORMATS
from runtime.kernels.cpu.block_layout import kept
from runtime.kernels.cpu.block_values import dequantized
from runtime.kernels.linear import linear_torch
from runtime.kernels.scaled_matrix import ScaledMatrix, empty_matrix


def int8_matrix(outputs: int = 6, columns: int = 128) -> ScaledMatrix:
    return ScaledMatrix(torch.randint(-128, 128, (outputs, columns), dtype=torch.int8), torch.rand(outputs) + 0.5)


def test_values_are_products_that_are_rounded_once() -> None:
    matrix = int8_matrix()
    exact = matrix.q.double() * matrix.scale.double()[:, None]
    assert torch.equal(matrix.dequantized(torch.float64), exact)
    assert torch.equal(matrix.dequantized(), exact.float())
    ids = torch.tensor([[5, 0, 3]])
    assert torch.equal(matrix.rows(ids), exact.float()[ids])
    for part, expected in zip(matrix.split([1, 3, 2]), exact.float().split([1, 3, 2]), strict=True):
        assert torch.equal(part.dequantized(), expected)
    assert (matrix.shape, len(matrix), matrix.numel(), matrix.nbytes) == ((6, 128), 6, 768, 768 + 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_plain_product_is_rounded_once_to_the_rows_dtype(dtype: torch.dtype) -> None:
    matrix, x = int8_matrix(), torch.randn(3, 128, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    expected = (x.to(wide) @ matrix.dequantized(wide).T).to(dtype)
    torch.testing.assert_close(linear_torch(x, matrix), expected, rtol=0 if dtype.itemsize == 2 else 1e-6, atol=0)


@pytest.mark.parametrize(
    ("q", "scale", "error", "message"),
    [
        (torch.zeros(4, 8), torch.ones(4), TypeError, "int16 and int64, got torch.float32 and torch.float32"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4).half(), TypeError, "got torch.int8 and torch.float16"),
        (
            torch.zeros(4, 8, dtype=torch.int8),
            torch.ones(3),
            ValueError,
            r"those of q \[4, 8\] torch.int8 on cpu, got \[3\]",
        ),
        (
            torch.zeros(4, 32, dtype=torch.int16),
            torch.ones(4, 2, dtype=torch.int64),
            ValueError,
            r"those of q \[4, 32\] torch.int16 on cpu, got \[4, 2\]",
        ),
    ],
)
def test_other_tensors_are_refused(q, scale, error, message) -> None:
    with pytest.raises(error, match=message):
        ScaledMatrix(q, scale)


def test_operations_refuse_a_matrix_of_another_width_and_compiled_kernels_any() -> None:
    x, out = torch.zeros(1, 64), torch.zeros(1, 6)
    with pytest.raises(ValueError, match=r"weight: expected a matrix \[outputs, 64\] on cpu, got ScaledMatrix"):
        kernels.residual_linear(out, x, int8_matrix())
    x = torch.zeros(1, 128)
    with pytest.raises(
        TypeError, match=r"a matrix of values or of blocks on a CPU, got ScaledMatrix\(\[6, 128\], int8"
    ):
        cpu_calls.captured(lambda ops: ops.residual_linear(out, x, int8_matrix()))


def int4_matrix(outputs: int = 5, columns: int = 384) -> tuple[ScaledMatrix, torch.Tensor, torch.Tensor]:
    """A matrix, and the integers and scales that it is made from."""
    q = torch.randint(0, 16, (outputs, columns), dtype=torch.uint8)
    d = torch.randn(outputs, columns // 32).half()
    return ScaledMatrix.of_groups(q, d), q, d


def test_repacking_int4_loses_nothing() -> None:
    matrix, q, d = int4_matrix()
    assert all(torch.equal(given, expected) for given, expected in zip(matrix.groups(), (q, d), strict=True))
    again = ScaledMatrix.of_groups(*matrix.groups())
    assert torch.equal(again.q, matrix.q) and torch.equal(again.scale, matrix.scale)
    expected = (q.double() - 8) * d.double().repeat_interleave(32, dim=1)
    assert torch.equal(matrix.dequantized(torch.float64), expected)
    assert torch.equal(matrix.dequantized(), expected.float()) and torch.equal(expected.float().double(), expected)
    ids = torch.tensor([4, 0])
    assert torch.equal(matrix.rows(ids), expected.float()[ids])
    assert torch.equal(torch.cat([part.dequantized() for part in matrix.split(2)]), expected.float())
    assert (matrix.format, matrix.shape, matrix.nbytes) == ("int4", (5, 384), 5 * 384 // 2 + 5 * 12 * 2)


def test_values_of_int4_are_those_of_q4_0() -> None:
    """Of a block of GGUF's: fp16 d, then bytes whose lower halves are the first 16 columns, whose upper the others."""
    matrix, q, d = int4_matrix()
    blocks = q.view(5, -1, 2, 16)
    stored = torch.cat((d.view(torch.uint8).view(5, -1, 2), blocks[:, :, 0] | blocks[:, :, 1] << 4), dim=2)
    values = dequantized(kept(stored.reshape(5, -1).numpy(), FORMATS["Q4_0"]), FORMATS["Q4_0"])
    assert np.array_equal(matrix.dequantized().numpy(), values)


def test_int4_of_half_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="q: expected a multiple of 128 columns, got 160"):
        ScaledMatrix.of_groups(torch.zeros(2, 160, dtype=torch.uint8), torch.ones(2, 5).half())


def halves(register: np.ndarray, kind: str) -> tuple[np.ndarray, ...]:
    """The two numbers of 16 bits in a register, lower first, in fp32."""
    parts = [(register >> shift & 0xFFFF).astype(np.uint16) for shift in (0, 16)]
    if kind == "f16x2":
        return tuple(part.view(np.float16).astype(np.float32) for part in parts)
    return tuple((part.astype(np.uint32) << 16).view(np.float32) for part in parts)


def pair(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    """A register of two numbers that 16 bits hold exactly."""
    if kind == "f16x2":
        parts = [part.astype(np.float16) for part in (low, high)]
        assert all((part.astype(np.float32) == exact).all() for part, exact in zip(parts, (low, high), strict=True))
        bits = [part.view(np.uint16).astype(np.uint32) for part in parts]
    else:
        bits = [part.astype(np.float32).view(np.uint32) for part in (low, high)]
        assert all((part & 0xFFFF == 0).all() for part in bits)
        bits = [part >> 16 for part in bits]
    return bits[0] | bits[1] << 16


def executed(assembly: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The registers after some lines of PTX, of the instructions that integers.py uses."""
    registers = dict(inputs)

    def value(operand: str) -> np.ndarray:
        if operand in registers:
            return registers[operand]
        return np.uint32(int(operand.removeprefix("0f"), 16) if operand.startswith("0f") else int(operand, 0))

    for line in assembly.strip().removeprefix("{").removesuffix("}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, operands = line.split(maxsplit=1)
        if name == "mov.b64":
            parts, source = re.fullmatch(r"\{(.*)\}, (\S+)", operands.strip()).groups()
            for place, part in enumerate(parts.split(", ")):
                registers[part] = (registers[source] >> np.uint64(16 * place) & np.uint64(0xFFFF)).astype(np.uint16)
            continue
        out, *operands = re.split(r",\s*", operands.strip())
        given = [value(operand) for operand in operands]
        if name == "mov.b32":
            made = given[0]
        elif name == "xor.b32":
            made = given[0] ^ given[1]
        elif name == "shr.u32":
            made = given[0] >> given[1]
        elif name == "prmt.b32":
            both = given[0].astype(np.uint64) | np.uint64(given[1]) << np.uint64(32)
            made = np.zeros_like(given[0])
            for place in range(4):
                selected = int(given[2]) >> 4 * place & 15
                assert selected < 8
                made |= (both >> np.uint64(8 * selected) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * place)
        elif name == "lop3.b32":
            a, b, c, table = (*given[:3], int(given[3]))
            made = np.zeros_like(a)
            for case in range(8):
                terms = [x if case >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0))]
                if table >> case & 1:
                    made |= terms[0] & terms[1] & terms[2]
        elif name == "cvt.f32.f16":
            made = given[0].view(np.float16).astype(np.float32).view(np.uint32)
        elif name == "sub.f32":
            made = (given[0].view(np.float32) - given[1].view(np.float32)).view(np.uint32)
        elif name == "sub.f16x2":
            made = pair(*(x - y for x, y in zip(*(halves(x, "f16x2") for x in given), strict=True)), "f16x2")
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            kind = name.removeprefix("fma.rn.")
            parts = [halves(x, kind) for x in given]
            made = pair(*(x * y + z for x, y, z in zip(*parts, strict=True)), kind)
        else:
            raise AssertionError(f"an instruction that is not known here: {line}")
        registers[out] = made
    return registers


BYTES = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), (4, 1)), axis=1)  # [4, 256]


@pytest.mark.parametrize(
    ("assembly", "kind"),
    [(integers.BYTES_TO_FP32, "f32"), (integers.BYTES_TO_FP16, "f16x2"), (integers.BYTES_TO_BF16, "bf16x2")],
    ids=["fp32", "fp16", "bf16"],
)
def test_the_assembly_widens_every_byte_in_every_place(assembly, kind) -> None:
    packed = sum(byte.astype(np.uint32) << np.uint32(8 * place) for place, byte in enumerate(BYTES))
    outputs = 4 if kind == "f32" else 2
    made = executed(assembly.value, {f"${outputs}": packed.astype(np.uint32)})
    registers = [made[f"${index}"] for index in range(outputs)]
    values = [x.view(np.float32) for x in registers] if kind == "f32" else sum((halves(x, kind) for x in registers), ())
    np.testing.assert_array_equal(np.stack(values), BYTES.view(np.int8).astype(np.float32))


WORDS = np.stack([np.arange(2**16, dtype=np.uint16), np.random.default_rng(1).permutation(2**16).astype(np.uint16)])


@pytest.mark.parametrize(
    ("assembly", "kind"),
    [(integers.NIBBLES_TO_FP32, "f32"), (integers.NIBBLES_TO_FP16, "f16x2"), (integers.NIBBLES_TO_BF16, "bf16x2")],
    ids=["fp32", "fp16", "bf16"],
)
def test_the_assembly_widens_every_word_in_both_places(assembly, kind) -> None:
    packed = WORDS[0].astype(np.uint32) | WORDS[1].astype(np.uint32) << np.uint32(16)
    outputs = 8 if kind == "f32" else 4
    made = executed(assembly.value, {f"${outputs}": packed})
    registers = [made[f"${index}"] for index in range(outputs)]
    values = [x.view(np.float32) for x in registers] if kind == "f32" else sum((halves(x, kind) for x in registers), ())
    expected = [(word >> 4 * group & 15).astype(np.float32) - 8 for group in range(4) for word in WORDS]
    np.testing.assert_array_equal(np.stack(values), np.stack(expected))


def test_the_assembly_widens_four_scales() -> None:
    scales = np.random.default_rng(2).standard_normal((512, 4)).astype(np.float16)
    made = executed(integers.HALVES_TO_FP32.value, {"$4": scales.view(np.uint64)[:, 0]})
    values = np.stack([made[f"${group}"].view(np.float32) for group in range(4)], axis=1)
    np.testing.assert_array_equal(values, scales.astype(np.float32))


@pytest.mark.parametrize(("format", "columns"), [("int4", 160), ("int3", 128)])
def test_formats_and_columns_without_kernels_are_refused(format, columns) -> None:
    with pytest.raises(ValueError, match=f"int4 with a multiple of 128 columns, got {format} with {columns}"):
        empty_matrix(2, columns, format, torch.device("meta"))


@pytest.mark.parametrize(
    ("form", "dtype", "max_rows", "matrices", "expected"),
    [
        ("int8", torch.bfloat16, 1, 2, Block("sum", 8, 2048, 4)),
        ("int8", torch.float32, 8, 2, Block("sum", 8, 2048, 4)),
        ("int8", torch.bfloat16, 8, 2, Block("loop", 16, 128, 4, 3)),
        ("int4", torch.bfloat16, 1, 2, Block("sum", 8, 2048, 4)),  # on an H200 1.75 times as fast as on tensor cores
        ("int4", torch.bfloat16, None, 2, Block("sum", 8, 2048, 4)),  # which take any number of rows
        ("int4", torch.float32, 1, 2, Block("sum", 8, 2048, 4)),
        ("int4", torch.float16, 64, 2, Block("loop", 16, 128, 2, 2)),
    ],
)
def test_a_block_depends_on_the_format_of_the_integers(form, dtype, max_rows, matrices, expected) -> None:
    assert block_for("gated_mlp", 16384, 2048, dtype, None, max_rows, matrices, form) == expected
    key = block_key("gated_mlp", 16384, 2048, dtype, 8, form)
    assert key == f"gated_mlp:16384x2048:{form}*{str(dtype).removeprefix('torch.')}:8"

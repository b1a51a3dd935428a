"""What interpreter.py does to Triton's interpreter: bf16 as PyTorch has it, and a kernel that leaves its arguments is
caught."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from runtime.kernels.launch import INTERPRETING

pytestmark = pytest.mark.skipif(
    not INTERPRETING, reason="about Triton's interpreter: TRITON_INTERPRET=1 (tests/test_interpreter.py)"
)

BF16 = torch.bfloat16
# Every value of 16 bits, every fp32 half-way between two of them, and the neighbours of those.
BITS = torch.arange(2**16, dtype=torch.int64)
EVERY = BITS.to(torch.uint16).view(BF16)
EDGES = [((BITS << 16) + offset).to(torch.uint32).view(torch.float32) for offset in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]


def same(given: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equality of bits, but for the NaN that is meant."""
    integer = {2: torch.int16, 4: torch.int32}[given.element_size()]
    equal = given.view(integer) == expected.view(integer)
    return bool((equal | (given.isnan() & expected.isnan())).all())


@triton.jit
def cast_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(len(x), dtype=dtype)
    cast_kernel[(1,)](out, x, BLOCK=len(x))
    return out


@pytest.mark.parametrize("values", range(5), ids=["exact", "below half", "half-way", "above half", "below the next"])
def test_fp32_is_rounded_to_bf16_as_pytorch_rounds_it(values):
    assert same(cast(EDGES[values], BF16), EDGES[values].to(BF16))


def test_a_million_random_bit_patterns_round_as_in_pytorch():
    x = torch.randint(2**32, (2**20,)).to(torch.uint32).view(torch.float32)
    assert same(cast(x, BF16), x.to(BF16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_bf16_is_widened_exactly(dtype):
    assert torch.equal(cast(EVERY, dtype).nan_to_num(7.0), EVERY.to(dtype).nan_to_num(7.0))


@triton.jit
def arithmetic_kernel(out_ptr, x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + BLOCK + at, x - y)
    tl.store(out_ptr + 2 * BLOCK + at, x * y)
    tl.store(out_ptr + 3 * BLOCK + at, tl.minimum(x, y).to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + 4 * BLOCK + at, tl.maximum(x, y).to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + 5 * BLOCK + at, tl.where(x < y, x, -y))
    tl.store(out_ptr + 6 * BLOCK + at, tl.abs(x))
    tl.store(out_ptr + 7 * BLOCK + at, (tl.max(x, axis=0) + at * 0).to(out_ptr.dtype.element_ty))


def test_arithmetic_and_comparisons_of_bf16_are_pytorchs():
    x, y = torch.randn(2, 4096).to(BF16)
    out = torch.full((8, 4096), torch.nan, dtype=BF16)
    arithmetic_kernel[(1,)](out, x, y, BLOCK=4096)
    expected = [x + y, x - y, x * y, torch.minimum(x, y), torch.maximum(x, y), torch.where(x < y, x, -y), x.abs()]
    for given, wanted in zip(out, [*expected, x.max().expand(4096)], strict=True):
        assert torch.equal(given, wanted)


@triton.jit
def dot_kernel(out_ptr, x_ptr, y_ptr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x, y = tl.load(x_ptr + row * SIZE + column), tl.load(y_ptr + row * SIZE + column)
    tl.store(out_ptr + row * SIZE + column, tl.dot(x, tl.trans(y), input_precision="ieee"))


def test_a_dot_of_bf16_is_that_of_its_values():
    x, y = torch.randn(2, 32, 32).to(BF16)
    out = torch.full((32, 32), torch.nan)
    dot_kernel[(1,)](out, x, y, SIZE=32)
    torch.testing.assert_close(out.double(), x.double() @ y.double().t(), rtol=0, atol=1e-5)


@triton.jit
def sum_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


def test_a_sum_of_bf16_is_refused():
    with pytest.raises(InterpreterError, match="widen it to fp32 first"):
        sum_kernel[(1,)](torch.zeros(1, dtype=BF16), torch.zeros(8, dtype=BF16), BLOCK=8)


@triton.jit
def copy_kernel(
    out_ptr, x_ptr, size, shift, BLOCK: tl.constexpr, LOAD_MASKED: tl.constexpr, STORE_MASKED: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + shift + at, mask=(at < size) | (LOAD_MASKED == 0), other=0.0)
    tl.store(out_ptr + at, x, mask=(at < size) | (STORE_MASKED == 0))


@triton.jit
def unmasked_copy_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def atomic_kernel(out_ptr, at, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        tl.atomic_max(out_ptr + at, 1, mask=at < 4)
    else:
        tl.atomic_max(out_ptr + at, 1)


@triton.jit
def swap_kernel(out_ptr, at):
    tl.atomic_cas(out_ptr + at, 0, 1)


def test_a_masked_kernel_stays_inside():
    # Parts of a longer row: what lies beside them is the base's, not the kernel's.
    x, out = torch.arange(12.0), torch.zeros(12)
    copy_kernel[(1,)](out[2:7], x[3:8], 5, 0, BLOCK=8, LOAD_MASKED=1, STORE_MASKED=1)
    assert out.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0]
    counts = torch.zeros(4, dtype=torch.int64)
    atomic_kernel[(1,)](counts, 4, HAS_MASK=1)
    atomic_kernel[(1,)](counts, 3, HAS_MASK=0)
    swap_kernel[(1,)](counts, 0)
    assert counts.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("shift", "load", "store", "message"),
    [
        (0, 0, 1, r"copy_kernel: load 12 bytes past the end of x_ptr, the nearest argument \(20 bytes\)"),
        (1, 1, 1, "copy_kernel: load 4 bytes past the end of x_ptr"),
        (-1, 1, 1, "copy_kernel: load 4 bytes before the start of x_ptr"),
        (0, 1, 0, "copy_kernel: store 12 bytes past the end of out_ptr"),
    ],
    ids=["load without a mask", "load one too far", "load one too early", "store without a mask"],
)
def test_an_overrun_is_caught_though_the_memory_is_there(shift, load, store, message):
    x, out = torch.arange(16.0), torch.zeros(16)
    with pytest.raises(InterpreterError, match=message):
        copy_kernel[(1,)](out[3:8], x[3:8], 5, shift, BLOCK=8, LOAD_MASKED=load, STORE_MASKED=store)
    assert not out.any(), "nothing was written"


def test_an_overrun_without_any_mask_is_caught():
    x, out = torch.arange(8.0), torch.zeros(8)
    with pytest.raises(InterpreterError, match="unmasked_copy_kernel: load 4 bytes past the end of x_ptr"):
        unmasked_copy_kernel[(1,)](out, x[:7], BLOCK=8)
    with pytest.raises(InterpreterError, match="unmasked_copy_kernel: store 4 bytes past the end of out_ptr"):
        unmasked_copy_kernel[(1,)](out[:7], x, BLOCK=8)


def test_an_atomic_outside_is_caught():
    counts = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(InterpreterError, match="atomic_kernel: atomic 8 bytes past the end of out_ptr"):
        atomic_kernel[(1,)](counts[:4], 4, HAS_MASK=0)
    with pytest.raises(InterpreterError, match="swap_kernel: atomic 8 bytes before the start of out_ptr"):
        swap_kernel[(1,)](counts[4:], -1)
    assert not counts.any()


def test_one_operation_may_not_run_from_one_argument_into_the_next():
    # Two arguments side by side in one piece of memory: every address is inside one of them.
    both = torch.arange(8.0)
    with pytest.raises(InterpreterError, match="copy_kernel: store 16 bytes past the end of out_ptr"):
        copy_kernel[(1,)](both[:4], both[4:], 4, 0, BLOCK=8, LOAD_MASKED=1, STORE_MASKED=0)


def test_an_argument_has_to_be_contiguous():
    with pytest.raises(ValueError, match="x_ptr is not contiguous"):
        unmasked_copy_kernel[(1,)](torch.zeros(4), torch.zeros(8)[::2], BLOCK=4)


@triton.jit
def other_kernel(out_ptr, x_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=["fp32", "fp16", "bf16"])
def test_a_masked_lane_without_a_value_holds_no_zero(dtype):
    out = torch.zeros(8, dtype=dtype)
    other_kernel[(1,)](out, torch.ones(8, dtype=dtype), 5, BLOCK=8)
    assert out[:5].eq(1).all() and out[5:].isnan().all()

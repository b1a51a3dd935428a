"""Faults planted in the kernels themselves: each is refused by the comparison that the healthy kernel passes."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from runtime.kernels.attention_splits import block_keys
from runtime.kernels.launch import INTERPRETING

from .attention_cases import attention_case
from .cases import FEW_SPLITS
from .catalogue import CASES, FLOATS

pytestmark = pytest.mark.skipif(
    not INTERPRETING, reason="takes a kernel apart: TRITON_INTERPRET=1 (tests/test_interpreter.py)"
)


@triton.jit
def norm_with_w(x, norm_weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    return (x * inverse * norm_weight).to(dtype).to(tl.float32)


@triton.jit
def norm_in_llamas_order(x, norm_weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    return ((x * inverse).to(dtype).to(tl.float32) * (1.0 + norm_weight)).to(dtype).to(tl.float32)


@triton.jit
def norm_over_the_block(x, norm_weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / x.shape[0] + eps)
    return (x * inverse * (1.0 + norm_weight)).to(dtype).to(tl.float32)


@triton.jit
def exact_gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def halves_rounded_once(first, second, cos, sin, dtype: tl.constexpr):
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def halves_the_wrong_way(first, second, cos, sin, dtype: tl.constexpr):
    return (first * cos + second * sin).to(dtype), (second * cos - first * sin).to(dtype)


@triton.jit
def scores_without_cap(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    return (scores.to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32)


@triton.jit
def scores_without_roundings(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    scaled = scores * scale / softcap
    return softcap * (2.0 / (1.0 + tl.exp(-2.0 * scaled)) - 1.0)


@triton.jit
def window_one_longer(position, window, MAX_SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    older = tl.minimum(position, window)
    size = tl.cdiv(tl.cdiv(older, MAX_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    return older, size, tl.cdiv(older, tl.maximum(size, 1))


@triton.jit
def last_split_dropped(position, window, MAX_SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    older = tl.minimum(position, window - 1)
    size = tl.cdiv(tl.cdiv(older, MAX_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    return older, size, tl.cdiv(older, tl.maximum(size, 1)) - 1


@triton.jit
def key_without_the_sign(logit, index):
    bits = logit.to(tl.int32, bitcast=True)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def key_of_the_logit_alone(logit, index):
    bits = logit.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index // 64 * 64).to(tl.int64)


@triton.jit
def key_that_skips_nan(logit, index):
    logit = tl.where(logit == 0.0, 0.0, logit)
    bits = logit.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def norm_halves_without_mask(weight_ptr, half, HALF_DIM: tl.constexpr, HAS_QK_NORM: tl.constexpr):
    weight1 = 1.0 + tl.load(weight_ptr + half).to(tl.float32)
    return weight1, 1.0 + tl.load(weight_ptr + HALF_DIM + half).to(tl.float32)


@triton.jit
def residual_without_mask(
    residual_out_ptr, x_ptr, branch_ptr, branch_norm, row, columns, stored, eps, WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr, STORE_RESIDUAL: tl.constexpr,
):  # fmt: skip
    return tl.where(columns < WIDTH, tl.load(x_ptr + row * WIDTH + columns).to(tl.float32), 0.0)


ALL, HALF = [*FLOATS], ["fp16", "bf16"]
# The case, the kernel's module, the device function, what takes its place, and the dtypes that it shows in.
PLANTED = [
    ("rms_norm, residual", "rms_norm", "normed_row", norm_with_w, ALL),
    ("rms_norm, residual", "rms_norm", "normed_row", norm_in_llamas_order, HALF),
    ("qkv_projection 37x84, branch", "qkv_projection", "normed_row", norm_in_llamas_order, HALF),
    ("gated_mlp 37x84", "gated_mlp", "normed_row", norm_over_the_block, ALL),
    ("gated_mlp, far below zero", "gated_mlp", "gelu_tanh", exact_gelu, ALL),
    ("decode_attention gqa, window, window", "decode_attention", "rotated_halves", halves_rounded_once, HALF),
    ("decode_attention gqa, window, window", "decode_attention", "rotated_halves", halves_the_wrong_way, ALL),
    ("decode_attention softcap, round the ring", "decode_attention", "finished_scores", scores_without_cap, ALL),
    ("decode_attention softcap, round the ring", "decode_attention", "finished_scores", scores_without_roundings, HALF),
    (
        "decode_attention window in a longer cache, round the ring",
        "decode_attention",
        "planned_splits",
        window_one_longer,
        ALL,
    ),
    ("decode_attention gqa, window, window", "attention_splits", "planned_splits", last_split_dropped, ALL),
    ("lm_head_argmax, below zero", "argmax", "ordered_key", key_without_the_sign, ALL),
    ("lm_head_argmax, equal rows", "argmax", "ordered_key", key_of_the_logit_alone, ALL),
    # The interpreter rounds a NaN to bf16 without its sign.
    ("lm_head_argmax, NaN", "argmax", "ordered_key", key_that_skips_nan, ["fp32", "fp16"]),
]


def plant(patch: pytest.MonkeyPatch, module: str, name: str, faulty) -> None:
    # The package's own attribute of this name is the operation.
    patch.setattr(sys.modules[f"runtime.kernels.{module}"], name, faulty)


@pytest.mark.parametrize(
    ("case", "module", "name", "faulty", "dtype"),
    [
        pytest.param(*planted, FLOATS[dtype], id=f"{planted[0]}: {planted[3].__name__}, {dtype}")
        for *planted, dtypes in PLANTED
        for dtype in dtypes
    ],
)
def test_a_fault_in_a_kernel_is_refused(case, module, name, faulty, dtype, monkeypatch):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel))
    plant(monkeypatch, module, name, faulty)
    given = call.run(call.kernel)
    with pytest.raises(AssertionError):
        call.compare(given)


# A kernel, what stands in it, and what takes its place.
REWRITTEN = {
    "splits combined without rescaling": (
        "combine_splits_kernel",
        "weight = tl.exp(highest - most)",
        "weight = tl.where(is_used, 1.0, 0.0)",
    ),
    "the new key combined without rescaling": (
        "combine_splits_kernel",
        "new_weight = tl.exp(new_highest - most)",
        "new_weight = 1.0",
    ),
    "splits averaged": (
        "combine_splits_kernel",
        "tl.sum(tl.sum(weight * total, axis=1), axis=0)",
        "tl.sum(tl.sum(weight, axis=1), axis=0)",
    ),
    "the new key left out": ("combine_splits_kernel", "sums = new_weight * new_partial + tl.sum", "sums = tl.sum"),
    "the new key's weight left out": ("combine_splits_kernel", "total = new_weight * new_total + ", "total = "),
    "unused splits combined": ("combine_splits_kernel", "[:, None] < splits", "[:, None] < MAX_SPLITS"),
    "the first older split taken for the new key": (
        "combine_splits_kernel",
        "older = new + 1 + tl.arange",
        "older = new + tl.arange",
    ),
    "each head combined with the first one's statistics": (
        "combine_splits_kernel",
        "older * (2 * HEADS) + head",
        "older * (2 * HEADS)",
    ),
    "new key not written": (
        "decode_attention_kernel",
        "tl.store(k_ptr + new_at + half, k1.to(dtype), mask=once)",
        "pass",
    ),
    "new key a slot late": ("decode_attention_kernel", "(position % slots)", "((position + 1) % slots)"),
    "first key left out": ("decode_attention_kernel", "begin = position - older +", "begin = position - older + 1 +"),
    "the last block not masked": ("decode_attention_kernel", "start + ahead < count", "start + ahead >= 0"),
    "an earlier block not rescaled": ("decode_attention_kernel", "acc1 = acc1 * shrink", "acc1 = acc1"),
    "an earlier block's weights not rescaled": ("decode_attention_kernel", "total = total * shrink", "total = total"),
    "later blocks not read": ("decode_attention_kernel", "has_next = next_start < count", "has_next = False"),
    "the next head begins at the last block": (
        "decode_attention_kernel",
        "has_next = has_next | ((place + 1 < PROGRAM_HEADS) & (count > BLOCK_KEYS))",
        "pass",
    ),
    "a later block reads past the ring": (
        "decode_attention_kernel",
        "slot = tl.where(slot < slots, slot, slot - slots)\n                        k1",
        "slot = tl.minimum(slot, slots - 1)\n                        k1",
    ),
}


def rewritten(patch: pytest.MonkeyPatch, folder: Path, kernel: str, right: str, wrong: str):
    """A kernel from its module's text with a fault in it."""
    module = {"combine_splits_kernel": "attention_splits", "decode_attention_kernel": "decode_attention"}[kernel]
    text = Path(sys.modules[f"runtime.kernels.{module}"].__file__).read_text()
    start = text.index(f"def {kernel}(")
    assert text.count(right, start) == 1, right
    path = folder / "faulty.py"
    path.write_text(text[:start] + text[start:].replace(right, wrong))
    spec = importlib.util.spec_from_file_location("faulty", path)
    faulty = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, "faulty", faulty)
    spec.loader.exec_module(faulty)
    return getattr(faulty, kernel)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fault", [None, *REWRITTEN])
def test_a_fault_written_into_attention_is_refused(fault, dtype, monkeypatch, tmp_path):
    """And attention without one is not, over splits of one block and of two, in rings that have gone round."""
    window = FEW_SPLITS * block_keys(dtype) + 6
    call = attention_case((2, window + 3, 3 * window - 2), 2, 1, 64, window, dtype)
    if fault:
        kernel, right, wrong = REWRITTEN[fault]
        plant(monkeypatch, "decode_attention", kernel, rewritten(monkeypatch, tmp_path, kernel, right, wrong))
    given = call.run(call.kernel)
    with pytest.raises(AssertionError) if fault else nullcontext():
        call.compare(given)


@pytest.mark.parametrize(
    ("case", "module", "name", "faulty", "message"),
    [
        (
            "decode_attention q/k norm, head_dim 80, window",
            "decode_attention",
            "norm_halves",
            norm_halves_without_mask,
            "decode_attention_kernel: load 48 bytes past the end of q_norm_ptr",
        ),
        (
            "qkv_projection 37x84",
            "qkv_projection",
            "residual_row",
            residual_without_mask,
            "qkv_projection_kernel: load 88 bytes past the end of x_ptr",
        ),
    ],
    ids=["norm of heads", "residual stream"],
)
def test_a_mask_left_out_of_a_kernel_is_caught(case, module, name, faulty, message, monkeypatch):
    call = CASES[case](torch.bfloat16)
    plant(monkeypatch, module, name, faulty)
    with pytest.raises(InterpreterError, match=message):
        call.run(call.kernel)

"""What people get wrong in these kernels, planted in a copy of each: the comparison that the kernels have to pass
refuses every one, and accepts the copies without it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from runtime.check.catalogue import CASES, FLOATS

from . import copies
from .parameters import cases_and_dtypes

pytestmark = pytest.mark.newest_only  # about the comparisons

# By case: what shows in the values, whatever the dtype.
VALUES = {
    "rms_norm": ["w instead of 1 + w"],
    "rms_norm, residual": ["residual missing"],
    "qkv_projection 37x84": ["w instead of 1 + w"],
    "qkv_projection 37x84, branch": ["branch not normalised", "norm of the old residual", "new residual not written"],
    "gated_mlp 37x84": ["w instead of 1 + w", "GELU on up"],
    "gated_mlp 37x84, branch": ["branch not normalised"],
    "gated_mlp, far below zero": ["exact GELU"],
    "residual_linear, residual": ["residual missing"],
    "lm_head_argmax, branch": ["w instead of 1 + w", "branch not normalised"],
    "lm_head_argmax, softcap": ["softcap omitted"],
    "lm_head_argmax, below zero": ["last vocabulary block unmasked", "last vocabulary block not looked at"],
    "lm_head_argmax, equal rows": ["tie to the highest index"],
    "lm_head_argmax, overflow": ["what is not finite picked"],
    "lm_head_argmax, masked, softcap": ["a mask left out"],
    "lm_head_argmax, NaN, masked": ["a NaN masked away"],
    "lm_head_argmax, NaN": ["a NaN skipped", "what is not finite picked"],
    "advance, none picked": ["a row goes on from nothing", "the last row for nothing"],
    "advance": [
        "a finished row emits",
        "a finished row moves on",
        "a stop token overlooked",
        "the first row's stop tokens for all",
        "a row passes its limit",
        "emitted a slot late",
    ],
    "decode_attention gqa, window, window": [
        "a neighbour's cache",
        "a split dropped",
        "interleaved pairs",
        "last block unmasked",
        "new key in the wrong slot",
        "new key not written",
        "query heads dealt out in turn",
        "rotated by the position before",
        "rotated the wrong way",
        "scale omitted",
        "splits averaged",
        "splits combined without rescaling",
        "the new key left out",
        "window one too short",
    ],
    "decode_attention gqa, window, first block": [
        "a split dropped",
        "splits averaged",
        "splits combined without rescaling",
        "the new key left out",
    ],
    "decode_attention window in a longer cache, round the ring": ["window one too long", "window one too short"],
    "decode_attention q/k norm, head_dim 80, window": ["q/k norm missing", "w instead of 1 + w"],
    "decode_attention softcap, round the ring": ["softcap omitted", "cap before scale"],
    "attention_and_projection, equal weights": ["residual missing", "splits averaged", "the new key left out"],
}
# What shows in the roundings to 16 bits alone: in fp32 there is none of them.
ROUNDINGS = {
    "rms_norm": ["Llama's order"],
    "rms_norm, residual": ["residual added before the norm is rounded"],
    "qkv_projection 37x84, branch": ["Llama's order", "branch added before it is rounded", "residual not rounded"],
    "gated_mlp 37x84": [
        "Llama's order",
        "activation not rounded",
        "gate product not rounded",
        "up product not rounded",
    ],
    "gated_mlp 37x84, branch": ["branch added before it is rounded", "residual not rounded"],
    "residual_linear, residual": ["residual added before rounding"],
    "lm_head_argmax, branch": ["Llama's order", "branch added before it is rounded", "residual not rounded"],
    "lm_head_argmax, softcap": ["softcap not rounded"],
    "lm_head_argmax, ties of 16 bits": ["argmax of unrounded logits", "tie to the highest index"],
    "advance": ["embedding scale not rounded"],
    "decode_attention, large scores": ["rotary rounded once", "scale before the product", "scores rounded"],
    "decode_attention q/k norm, head_dim 80, window": ["Llama's order", "rotary rounded once"],
    "decode_attention softcap, round the ring": ["scale before the product", "scores not rounded"],
    "attention_and_projection, equal weights": ["attention not rounded", "residual added before rounding"],
}


def copy_of(case: str, fault: str = ""):
    return partial(getattr(copies, case.split(" ")[0].rstrip(",")), fault=fault)


def faults(planted: dict[str, list[str]], names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("case", "fault", "dtype"),
        [
            pytest.param(case, fault, FLOATS[name], id=f"{case}: {fault}, {name}")
            for case, found in planted.items()
            for fault in found
            for name in names
        ],
    )


def assert_refused(case: str, fault: str, dtype: torch.dtype) -> None:
    call = CASES[case](dtype)
    call.compare(call.run(copy_of(case)))
    with pytest.raises(AssertionError):
        call.compare(call.run(copy_of(case, fault)))


@cases_and_dtypes()
def test_a_copy_without_a_fault_is_accepted(case, dtype):
    call = CASES[case](dtype)
    call.compare(call.run(copy_of(case)))


@faults(VALUES, [*FLOATS])
def test_a_wrong_value_is_refused(case, fault, dtype):
    assert_refused(case, fault, dtype)


@faults(ROUNDINGS, ["fp16", "bf16"])
def test_a_wrong_rounding_is_refused(case, fault, dtype):
    assert_refused(case, fault, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_ties_are_made_by_rounding(dtype):
    call = CASES["lm_head_argmax, ties of 16 bits"](dtype)
    logits, exact = (call.run(call.reference, dtype=kind)["logits"][0] for kind in (None, torch.float64))
    assert torch.nonzero(logits == logits.max())[:, 0].tolist() == [7, 40, 200, 297]
    assert exact[[7, 40, 200, 297]].diff().gt(0).all()


@pytest.mark.parametrize("fault", ["a result left unwritten", "a result of zeros"])
@cases_and_dtypes()
def test_an_empty_result_is_refused(case, dtype, fault):
    call = CASES[case](dtype)
    given = call.run(copy_of(case))
    for name in call.outputs:
        emptied = given | {name: torch.full_like(given[name], torch.nan if "unwritten" in fault else 0.0)}
        with pytest.raises(AssertionError):
            call.compare(emptied)

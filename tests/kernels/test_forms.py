"""The forms of the product: each against the reference, and a row's bits at every number of rows."""

from __future__ import annotations

import pytest
import torch

from runtime.check.case import DEVICE
from runtime.check.catalogue import CASES, FLOATS
from runtime.check.head_cases import head_case, masked_head
from runtime.check.step_cases import linear_case, projection_case
from runtime.kernels.launch import INTERPRETING

from .forms import FORMS, run_form
from .parameters import marks_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETING,
        reason="kernels need a GPU, or TRITON_INTERPRET=1 (tests/test_interpreter.py)",
    ),
]

WHOLE = (
    "qkv_projection 64x128",
    "qkv_projection 64x128, branch",
    "gated_mlp 64x128",
    "gated_mlp 64x128, branch",
    "residual_linear 64x128",
)
PADDED = (
    "qkv_projection 37x84, branch",
    "gated_mlp 130x200, branch",
    "residual_linear 37x84",
    "residual_linear, residual",
    "lm_head_argmax",
    "lm_head_argmax, branch, softcap",
    "lm_head_argmax, masked, softcap",
    "lm_head_argmax, overflow",
    "lm_head_argmax, below zero",
)
# With the oldest versions each kernel in every form and dtype, whole and padded.
WITH_OLDEST = (
    "qkv_projection 64x128, branch",
    "gated_mlp 64x128, branch",
    "residual_linear 64x128",
    "qkv_projection 37x84, branch",
    "gated_mlp 130x200, branch",
    "residual_linear 37x84",
    "lm_head_argmax, branch, softcap",
)
DTYPES = {form: [dtype for dtype in FLOATS if block.form == "sum" or dtype != "fp32"] for form, block in FORMS.items()}
BLOCKS = [
    pytest.param(name, form, FLOATS[dtype], id=f"{name}, {form}, {dtype}", marks=marks_of(name, WITH_OLDEST))
    for form, block in FORMS.items()
    for name in (*WHOLE, *(PADDED if block.form != "held" else ()))
    for dtype in DTYPES[form]
]


@pytest.mark.parametrize(("name", "form", "dtype"), BLOCKS)
def test_every_form_computes_what_the_reference_does(name, form, dtype):
    case = CASES[name](dtype)
    case.compare(run_form(case, FORMS[form]))


MANY = {
    "qkv_projection": lambda rows, dtype: projection_case("qkv_projection", rows, 48, 128, dtype, branched=True),
    "gated_mlp": lambda rows, dtype: projection_case("gated_mlp", rows, 48, 128, dtype, branched=True),
    "residual_linear": lambda rows, dtype: linear_case(rows, 48, 128, dtype, with_residual=True),
    "lm_head_argmax": lambda rows, dtype: head_case(rows, 48, 128, dtype, branched=True, softcap=30.0),
    "lm_head_argmax, masked": lambda rows, dtype: masked_head(rows, 48, 128, dtype),
}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param(form, FLOATS[dtype], id=f"{form}, {dtype}", marks=marks_of(dtype, ["bf16"]))
        for form in FORMS
        for dtype in DTYPES[form]
    ],
)
@pytest.mark.parametrize("name", MANY)
def test_a_rows_bits_are_the_same_at_every_number_of_rows(name, form, dtype):
    block = FORMS[form]
    most = 64 if block.form == "loop" else 8
    case = MANY[name](most, dtype)
    together = run_form(case, block)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 8), slice(0, 16), slice(30, 60)):
        if rows.stop > most:
            continue
        for output, given in run_form(case, block, rows).items():
            assert torch.equal(given, together[output][rows]), f"{output} of rows {rows.start} to {rows.stop}"

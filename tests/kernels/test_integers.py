"""Products of integers with scales: each operation and form against its reference on the dequantised matrix, a row's
bits at every number of rows, and faults that the comparisons refuse."""

from __future__ import annotations

import pytest
import torch

from runtime.check.case import DEVICE
from runtime.check.catalogue import FLOATS
from runtime.check.head_cases import head_case
from runtime.check.integer_cases import CASES, of_integers
from runtime.check.step_cases import linear_case, projection_case
from runtime.kernels.block import Block
from runtime.kernels.launch import INTERPRETING

from .forms import run_form
from .parameters import dtypes
from .test_planted_in_kernels import plant, rewritten

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETING,
        reason="kernels need a GPU, or TRITON_INTERPRET=1 (tests/test_interpreter.py)",
    ),
]
FORMS = {
    "sum in pieces": Block("sum", 16, 64, 2),
    "loop": Block("loop", 16, 32, 2, 2),
    "held": Block("held", 16, 64, 4),
}
IN_16_BITS = [
    (form, dtype) for form, block in FORMS.items() for dtype in FLOATS if block.form == "sum" or dtype != "fp32"
]
forms_and_dtypes = pytest.mark.parametrize(
    ("form", "dtype"), [pytest.param(form, FLOATS[dtype], id=f"{form}, {dtype}") for form, dtype in IN_16_BITS]
)


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_what_its_reference_does(case, dtype):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel))


@dtypes
def test_a_model_of_one_row_has_programs_of_its_own(dtype):
    call = CASES["gated_mlp 37x96, int8"](dtype)
    call.compare(call.run(call.kernel_of(1)))


def eight_rows(name, dtype):
    if name == "residual_linear":
        return of_integers(linear_case(8, 48, 128, dtype, with_residual=True), "weight")
    if name == "lm_head_argmax":
        return of_integers(head_case(8, 48, 128, dtype, branched=True, softcap=30.0), "table")
    field = {"qkv_projection": "weight", "gated_mlp": "gate_up"}[name]
    return of_integers(projection_case(name, 8, 48, 128, dtype, branched=True), field)


@forms_and_dtypes
@pytest.mark.parametrize("name", ["qkv_projection", "gated_mlp", "residual_linear", "lm_head_argmax"])
def test_every_form_is_right_and_a_rows_bits_are_the_same_at_every_number_of_rows(name, form, dtype):
    case = eight_rows(name, dtype)
    together = run_form(case, FORMS[form])
    case.compare(together)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 8)):
        for output, given in run_form(case, FORMS[form], rows).items():
            assert torch.equal(given, together[output][rows]), f"{output} of rows {rows.start} to {rows.stop}"


PROJECTION, MLP, TABLE = "qkv_projection 64x128, branch, int8", "gated_mlp 37x96, int8", "advance, int8"
# The case, the form, the function, what stands in it and what takes its place.
FAULTS = {
    "no scale": (PROJECTION, "sum in pieces", "summed_products", "sums * scales[0]", "sums"),
    "no scale, on tensor cores": (PROJECTION, "loop", "dot_products", "sums * scales[0][:, None]", "sums"),
    "the scale of the row before": (
        PROJECTION, "sum in pieces", "row_scales", "tl.load(scale_ptr + outputs", "tl.load(scale_ptr + (outputs ^ 1)"
    ),
    "gate's scales for up": (MLP, None, "gated_mlp_kernel", "scale_ptr, OUTPUTS + outputs", "scale_ptr, outputs"),
    "an embedding without its scale": (TABLE, None, "advance_kernel", "embedding *= ", "embedding + "),
}  # fmt: skip


@pytest.mark.newest_only  # about the comparisons
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(fault, monkeypatch, tmp_path):
    name, form, *texts = FAULTS[fault]
    case = CASES[name](torch.bfloat16)

    def given():
        return case.run(case.kernel) if form is None else run_form(case, FORMS[form])

    case.compare(given())
    plant(monkeypatch, texts[0], rewritten(monkeypatch, tmp_path, *texts))
    with pytest.raises(AssertionError):
        case.compare(given())

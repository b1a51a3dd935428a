"""Products of integers with scales: each operation and form against its reference on the dequantised matrix, a row's
bits at every number of rows, and faults that the comparisons refuse."""

from __future__ import annotations

import pytest
import torch

from runtime.check.case import DEVICE, Case, Results
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
# Small blocks; of 384 columns 256 are one piece and 128 another, or not whole passes of a loop.
FORMS = {
    "int8, sum": Block("sum", 16, 256, 2),
    "int8, loop": Block("loop", 16, 64, 4, 2),
    "int8, held": Block("held", 16, 128, 4),
    "int4, sum": Block("sum", 16, 256, 2),
    "int4, loop": Block("loop", 16, 256, 2, 2),
    "int4, short loop": Block("loop", 16, 128, 1, 2),
}
forms_and_dtypes = pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param(form, FLOATS[dtype], id=f"{form}, {dtype}")
        for form, block in FORMS.items()
        for dtype in FLOATS
        if block.form == "sum" or dtype != "fp32"
    ],
)


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_what_its_reference_does(case, dtype):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel))


@pytest.mark.newest_only  # shapes of what other tests compute with the oldest too
@dtypes
@pytest.mark.parametrize("case", ["gated_mlp 9x96, int8", "gated_mlp 9x384, int4"])
def test_a_model_of_one_row_has_programs_of_its_own(case, dtype):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel_of(1)))


def eight_rows(name: str, form: str, dtype: torch.dtype) -> Case:
    if name == "residual_linear":
        return of_integers(linear_case(8, 24, 384, dtype, with_residual=True), "weight", form)
    if name == "lm_head_argmax":
        return of_integers(head_case(8, 24, 384, dtype, branched=True, softcap=30.0), "table", form)
    field = {"qkv_projection": "weight", "gated_mlp": "gate_up"}[name]
    return of_integers(projection_case(name, 8, 24, 384, dtype, branched=True), field, form)


@pytest.mark.newest_only  # shapes of what other tests compute with the oldest too
@forms_and_dtypes
@pytest.mark.parametrize("name", ["qkv_projection", "gated_mlp", "residual_linear", "lm_head_argmax"])
def test_every_form_is_right_and_a_rows_bits_are_the_same_at_every_number_of_rows(name, form, dtype):
    case = eight_rows(name, form.split(",")[0], dtype)
    together = run_form(case, FORMS[form])
    case.compare(together)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 8)):
        for output, given in run_form(case, FORMS[form], rows).items():
            assert torch.equal(given, together[output][rows]), f"{output} of rows {rows.start} to {rows.stop}"


def test_int4_has_no_held_form():
    case = CASES["residual_linear 18x640, residual, int4"](torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected no held form and a multiple of 128 columns of int4, got Block"):
        run_form(case, Block("held", 16, 128, 4))


PROJECTION, MLP, TABLE = "qkv_projection 20x128, branch, int8", "gated_mlp 9x96, int8", "advance, int8"
WORDS, EMBEDDED = "residual_linear 18x640, residual, int4", "advance, int4"
# The case, the form, the function, what stands in it and what takes its place.
FAULTS = {
    "no scale": (PROJECTION, "int8, sum", "summed_products", "sums * scales[0]", "sums"),
    "no scale, on tensor cores": (PROJECTION, "int8, loop", "dot_products", "sums * scales[0][:, None]", "sums"),
    "a neighbour's scale": (
        PROJECTION,
        "int8, sum",
        "row_scales",
        "tl.load(scale_ptr + outputs",
        "tl.load(scale_ptr + (outputs ^ 1)",
    ),
    "gate's scales for up": (MLP, None, "gated_mlp_kernel", "scale_ptr, OUTPUTS + outputs", "scale_ptr, outputs"),
    "an embedding without its scale": (
        TABLE,
        None,
        "advance_kernel",
        " * tl.load(scale_ptr + tl.maximum(token, 0))",
        "",
    ),
    "nibbles swapped": (WORDS, "int4, loop", "widened_groups", "((words & 15)", "((words >> 4 & 15)"),
    "a zero point off by one": (WORDS, "int4, sum", "widened_groups", "words >> 8 & 15) - 8", "words >> 8 & 15) - 7"),
    "a neighbouring group's scale": (
        WORDS,
        "int4, loop",
        "looped_products_of_words",
        "of_group[GROUP]",
        "of_group[GROUP ^ 1]",
    ),
    "another group's columns": (WORDS, "int4, sum", "columns_of", "GROUP * 32", "(GROUP ^ 1) * 32"),
    "an embedding's nibbles shifted": (EMBEDDED, None, "row_of_words", "4 * group & 15", "4 * (group ^ 1) & 15"),
}


def results(case: Case, form: str | None) -> Results:
    return case.run(case.kernel) if form is None else run_form(case, FORMS[form])


@pytest.mark.newest_only  # about the comparisons
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(fault, monkeypatch, tmp_path):
    name, form, *texts = FAULTS[fault]
    case = CASES[name](torch.bfloat16)
    case.compare(results(case, form))
    plant(monkeypatch, texts[0], rewritten(monkeypatch, tmp_path, *texts))
    with pytest.raises(AssertionError):
        case.compare(results(case, form))

"""Every candidate form gives the product, and a row's bits do not depend on its neighbours; in Triton's interpreter."""

import pytest
import torch

from runtime.bench.candidates.products import Candidate, Inputs, candidates, check
from runtime.bench.tune import Case
from runtime.kernels.launch import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="TRITON_INTERPRET=1 runs the kernels without a GPU")

TOLERANCE = 3e-2  # the interpreter of Triton 3.6 cuts off where a GPU rounds
HELD = {"block_outputs": 16, "slices": 4, "n": 8, "piece": 64, "warps": 4, "pinned": 1}
LOOP = {"block_outputs": 16, "block_width": 16, "slices": 4, "stages": 3, "warps": 4}
FORMS = [
    ("held", HELD | {"branch": 1}, ("qkv_projection", "gated_mlp")),
    ("held", HELD | {"branch": 0}, ("lm_head", "gated_mlp", "down")),
    ("loop", LOOP | {"n": 8}, ("gated_mlp", "down")),
    ("loop", LOOP | {"n": 32, "block_width": 32}, ("gated_mlp", "lm_head")),
    ("held4", {"block_outputs": 16, "n": 8, "piece": 128, "warps": 4}, ("gated_mlp",)),
    ("sum", {"block_outputs": 4, "piece": 128, "warps": 2}, ("gated_mlp", "lm_head")),
    ("packed", {"block_outputs": 4, "piece": 64, "warps": 1}, ("gated_mlp", "qkv_projection")),
]
CASES = [
    pytest.param(form, params, kernel, id=f"{form}-{kernel}-{i}")
    for i, (form, params, kernels) in enumerate(FORMS)
    for kernel in kernels
]


@pytest.mark.parametrize(("form", "params", "kernel"), CASES)
def test_a_form_gives_the_product(form, params, kernel):
    case = Case(kernel, 32, 192, form != "held" or bool(params["branch"]), 64)  # three pieces, or main and tail
    candidate = Candidate("small", kernel, case, form, params)
    inputs = Inputs.of(case, 2, torch.device("cpu"))
    expected = inputs.expected(candidate.has_norm, candidate.has_branch, candidate.is_gated)
    assert check(candidate, inputs, expected, TOLERANCE)["row_bits_equal"]


def test_a_residual_is_kept():
    case = Case("qkv_projection", 32, 192, True, 64)
    kept = []
    for form, params, rows in ((*FORMS[0][:2], 8), (*FORMS[5][:2], 1), (*FORMS[6][:2], 1)):
        inputs = Inputs.of(case, 1, torch.device("cpu"))
        candidate = Candidate("small", case.kernel, case, form, params)
        check(candidate, inputs, inputs.expected(True, True, False), TOLERANCE)
        kept.append(inputs.residual_out[0])
        assert not torch.equal(
            inputs.residual_out[rows - 1], Inputs.of(case, 1, torch.device("cpu")).residual_out[rows - 1]
        )
    assert all(torch.allclose(row, kept[0], rtol=1e-2, atol=1e-2) for row in kept)


def test_names_are_unique():
    names = [candidate.name for candidate in candidates(["gemma-3-1b", "gemma-3-270m"]) if candidate.form != "today"]
    assert len(set(names)) == len(names)

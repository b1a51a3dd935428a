"""Each kernel of a prompt's chunk against its reference, by the comparisons of test_kernels.py: on a GPU, or in
Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch

from runtime.check.case import DEVICE
from runtime.check.chunk_cases import BATCH, CASES, ROW
from runtime.kernels.launch import INTERPRETING

from .parameters import dtypes

pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice"),  # padding is NaN
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETING,
        reason="kernels need a GPU, or TRITON_INTERPRET=1 (tests/test_interpreter.py)",
    ),
]
BF16 = torch.bfloat16


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_what_its_reference_does(case, dtype):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("chunk_attention")])
def test_a_chunks_bits_depend_on_nothing_but_tokens(case):
    """Not on the row, on what padding holds, on what other slots hold, or on how many slots a full layer has."""
    call = CASES[case](BF16)
    expected = call.run(call.kernel)["out"]
    for cache in ("k_cache", "v_cache"):
        buffer = call.inputs[cache]
        if call.options["window"] is None:
            buffer = torch.cat((buffer, torch.full_like(buffer[:, :, :7], 3e4)), dim=2)
        call.inputs[cache] = buffer.roll(1, 0).nan_to_num(-2e4).contiguous()
    call.inputs["qkv"] = call.inputs["qkv"].nan_to_num(5e3)
    call.inputs["chunk"][0] = (ROW + 1) % BATCH
    assert torch.equal(call.run(call.kernel)["out"], expected)

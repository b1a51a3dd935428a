"""Every kernel on shapes that nobody chose, each as exact as its reference: products in every form that has them, and
both of attention's kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.check.attention_cases import attention_case, pair_case
from runtime.check.case import DEVICE, Case
from runtime.check.catalogue import FLOATS
from runtime.check.head_cases import head_case
from runtime.check.step_cases import advance_case, linear_case, norm_case, projection_case
from runtime.kernels.block import Block
from runtime.kernels.launch import INTERPRETING

from .forms import FORMS, run_form
from .splits import limit_splits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETING,
        reason="kernels need a GPU, or TRITON_INTERPRET=1 (tests/test_interpreter.py)",
    ),
]

ROWS, OUTPUTS = st.integers(1, 8), st.integers(1, 80)
WIDTH = st.integers(2, 140) | st.sampled_from([64, 128])
DTYPES, FLAG = st.sampled_from([*FLOATS.values()]), st.booleans()


@st.composite
def attentions(draw: st.DrawFn):
    """decode_attention alone or with its projection."""
    positions = tuple(draw(st.lists(st.integers(0, 60), min_size=1, max_size=3)))
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(1, 48))
    window = draw(st.none() | st.integers(1, 50))
    case = attention_case(
        positions,
        group * kv_heads,
        kv_heads,
        head_dim,
        window,
        draw(DTYPES),
        qk_norm=draw(FLAG),
        softcap=draw(st.sampled_from([None, 50.0])),
        scale=draw(st.sampled_from([None, 20**-0.5])),
        spare_slots=draw(st.integers(0, 5)),
    )
    return pair_case(case, draw(OUTPUTS)) if draw(FLAG) else case


CASES = {
    "rms_norm": st.builds(norm_case, ROWS, WIDTH, DTYPES, FLAG),
    "qkv_projection": st.builds(projection_case, st.just("qkv_projection"), ROWS, OUTPUTS, WIDTH, DTYPES, FLAG),
    "gated_mlp": st.builds(projection_case, st.just("gated_mlp"), ROWS, OUTPUTS, WIDTH, DTYPES, FLAG),
    "residual_linear": st.builds(linear_case, ROWS, OUTPUTS, WIDTH, DTYPES, FLAG),
    "lm_head_argmax": st.builds(
        head_case, ROWS, st.integers(1, 400), WIDTH, DTYPES, FLAG, st.sampled_from([None, 30.0])
    ),
    "advance": st.builds(advance_case, ROWS, WIDTH, DTYPES),
    "decode_attention": attentions(),
}


def fits(case: Case, block: Block) -> bool:
    """Whether a block can have a product: whole pieces are held, and tensor cores are for 16 bits."""
    if block.form == "sum":
        return True
    width = case.inputs["x"].shape[1]
    return case.dtype.itemsize == 2 and (block.form != "held" or width % block.columns == 0)


@pytest.mark.newest_only  # shapes of what other tests compute with the oldest too
@pytest.mark.parametrize("kernel", CASES)
# The same examples in every run: what fails here fails for everyone.
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_a_kernel_is_right_in_any_shape(kernel, data, seed):
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        if kernel == "decode_attention":  # splits of one block and of several
            limit_splits(patch, data.draw(st.sampled_from([2, 8, 128])))
        case = data.draw(CASES[kernel])
        if kernel == "decode_attention":
            given = case.run(case.kernel_of(data.draw(st.sampled_from([1, 8]))))
        elif kernel in ("rms_norm", "advance"):
            given = case.run(case.kernel)
        else:
            forms = [block for block in FORMS.values() if fits(case, block)]
            given = run_form(case, data.draw(st.sampled_from(forms)))
        case.assert_right(given)

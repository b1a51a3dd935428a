"""Where a token's time goes: every launch of a step is on the clock, and nothing is left changed."""

import dataclasses

import pytest

from runtime import kernels
from runtime.bench.parts import step_parts
from runtime.kernels.cpu import calls as cpu_calls


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "captured"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_every_launch_is_counted(small_pair, family, eager):
    model = small_pair(family).ours
    if not eager and cpu_calls.missing(model.dtype):
        pytest.skip(cpu_calls.missing(model.dtype))
    model = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=eager))
    before = {name: getattr(kernels, name) for name in kernels.__all__}
    parts = {part.name: part for part in step_parts(model, 2, 20)}
    assert all(part.time_us > 0 for part in parts.values())
    layers = len(model.config.layers)
    expected = dict.fromkeys(("qkv_projection", "decode_attention", "gated_mlp"), layers)
    expected |= dict.fromkeys(("lm_head_argmax", "advance"), 1)
    # One compiled kernel serves both projections back into the stream.
    expected |= {"output_projection": layers, "residual_linear": layers} if eager else {"residual_linear": 2 * layers}
    assert {name: part.launches for name, part in parts.items()} == expected
    assert {name: getattr(kernels, name) for name in kernels.__all__} == before

"""Where a token's time goes: every launch of a step is on the clock, and nothing is left changed."""

import dataclasses

import pytest

from runtime import kernels
from runtime.bench.parts import step_parts
from runtime.kernels import cpu_calls


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
    layers = model.config.layers
    for name in ("qkv_projection", "decode_attention", "output_projection", "gated_mlp"):
        if eager or name in parts:
            assert parts[name].launches == layers, name
    assert parts["lm_head_argmax"].launches == 1
    assert sum(part.launches for part in parts.values()) >= 4 * layers + 2
    assert {name: getattr(kernels, name) for name in kernels.__all__} == before

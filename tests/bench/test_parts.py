"""Where a token's time goes: every operation of a step is on the clock."""

import dataclasses

import pytest

from runtime.bench.parts import step_parts
from runtime.kernels.cpu import calls as cpu_calls

pytestmark = pytest.mark.newest_only  # about code of our own


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "captured"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_every_operation_is_counted(small_pair, family, eager):
    model = small_pair(family).ours
    if not eager and cpu_calls.missing(model.dtype):
        pytest.skip(cpu_calls.missing(model.dtype))
    model = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=eager))
    parts = {part.name: part for part in step_parts(model, 2, 20)}
    assert all(part.time_us > 0 for part in parts.values())
    layers = len(model.config.layers)
    # Attention's output and the MLP's go through one operation.
    expected = dict.fromkeys(("qkv_projection", "decode_attention", "gated_mlp"), layers)
    expected["residual_linear"] = 2 * layers
    expected |= dict.fromkeys(("lm_head_argmax", "advance"), 1)
    assert {name: part.launches for name, part in parts.items()} == expected

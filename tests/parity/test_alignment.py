"""The bits of the plain PyTorch forms do not depend on where in memory a weight or a row lies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from runtime.engine.decode import decode_step
from runtime.engine.graph import ops_of
from runtime.engine.prefill import prefill
from runtime.families.state import new_state
from runtime.kernels import linear

pytestmark = pytest.mark.usefixtures("one_thread")

# Sizes at which parts and rows end at no multiple of 16 bytes, in fp32 and in bf16.
ODD = {
    "odd width": {"hidden_size": 63, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 22},
    "odd intermediate": {"hidden_size": 52, "intermediate_size": 77, "head_dim": 6},
    "one key head": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10, "hidden_size": 35},
}
every_odd_size = pytest.mark.parametrize("sizes", ODD)
every_family = pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@every_family
@every_dtype
@every_odd_size
def test_every_operand_of_a_product_is_aligned(family, dtype, sizes, small_pair, random_ids, monkeypatch):
    model, seen = small_pair(family, dtype, **ODD[sizes]).ours, []
    model = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=True))
    plain = linear.F.linear

    def watched(x, weight):
        seen.extend(operand.data_ptr() % linear.ALIGNMENT for operand in (x, weight))
        return plain(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    state = new_state(model, 3)
    for row, length in enumerate((1, 7, 20)):
        prefill(model, state, row, random_ids(length))
    decode_step(ops_of(model), model, state)
    products = 7 * len(model.config.layers) + 1  # a token's or a chunk's: q, k, v, output, gate, up, down; and the head
    assert len(seen) == 2 * (3 + 3) * products
    assert not any(seen)


@every_family
@every_odd_size
def test_rows_of_odd_width_equal_their_solo_runs(family, sizes, small_pair, random_ids):
    """In fp32 a row that lies off the alignment would give other bits."""
    model, prompts = small_pair(family, **ODD[sizes]).ours, [random_ids(length, seed=length) for length in (5, 1, 18)]

    def logits(rows):
        state = new_state(model, len(rows), with_logits=True)
        for row, ids in enumerate(rows):
            prefill(model, state, row, ids)
        steps = []
        for _ in range(4):
            decode_step(ops_of(model), model, state)
            steps.append(state.logits.clone())
        return torch.stack(steps)

    together = logits(prompts)
    for row, ids in enumerate(prompts):
        assert torch.equal(together[:, row], logits([ids])[:, 0])


@pytest.mark.parametrize("rows", [1, 3])
@every_dtype
def test_a_product_has_the_same_bits_at_every_address(dtype, rows):
    def at(offset: int, tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.nbytes + 2 * linear.ALIGNMENT, dtype=torch.uint8)
        start = -room.data_ptr() % linear.ALIGNMENT + offset
        return room[start : start + tensor.nbytes].view(dtype).view(tensor.shape).copy_(tensor)

    for outputs, columns in [(84, 147), (147, 84), (499, 84), (33, 77), (257, 640)]:
        weight, x = torch.randn(outputs, columns).to(dtype), torch.randn(rows, columns).to(dtype)
        expected = linear.linear_torch(x, weight)
        for offset in range(dtype.itemsize, linear.ALIGNMENT, dtype.itemsize):
            assert torch.equal(linear.linear_torch(at(offset, x), weight), expected)
            assert torch.equal(linear.linear_torch(x, at(offset, weight)), expected)

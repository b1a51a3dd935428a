"""A row of a batch gives, bit for bit, what its prompt gives alone: other rows share the step and nothing else."""

from __future__ import annotations

import pytest
import torch

from runtime.engine.decode import decode_step
from runtime.engine.graph import ops_of
from runtime.engine.prefill import prefill
from runtime.families.state import new_state

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 40
LENGTHS = [1, 23, 7, 16, 55, 2, 17, 30]


def run(model, prompts: list[list[int]]) -> tuple[list[list[int]], torch.Tensor]:
    """The rows' tokens and their logits [tokens, rows, vocab]."""
    state = new_state(model, len(prompts), with_logits=True)
    for row, ids in enumerate(prompts):
        prefill(model, state, row, ids)
    picked, logits = [state.token.tolist()], [state.logits.clone()]
    for _ in range(TOKENS - 1):
        decode_step(ops_of(model), model, state)
        picked.append(state.token.tolist())
        logits.append(state.logits.clone())
    return [list(row) for row in zip(*picked, strict=True)], torch.stack(logits)


@pytest.mark.parametrize("batch", [*(pytest.param(rows, marks=pytest.mark.newest_only) for rows in (2, 4)), 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_rows_equal_their_solo_runs(family, dtype, batch, small_pair, random_ids):
    model = small_pair(family, dtype).ours
    prompts = [random_ids(length, seed=row) for row, length in enumerate(LENGTHS[:batch])]
    tokens, logits = run(model, prompts)
    assert len({token for row in tokens for token in row}) >= 16
    for row, ids in enumerate(prompts):
        solo_tokens, solo_logits = run(model, [ids])
        assert tokens[row] == solo_tokens[0]
        assert torch.equal(logits[:, row], solo_logits[:, 0])


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_the_order_of_rows_changes_nothing(family, small_pair, random_ids):
    model = small_pair(family, torch.bfloat16).ours
    prompts = [random_ids(length, seed=row) for row, length in enumerate(LENGTHS[:4])]
    tokens, logits = run(model, prompts)
    turned_tokens, turned_logits = run(model, prompts[::-1])
    assert turned_tokens == tokens[::-1]
    assert torch.equal(turned_logits, logits.flip(1))

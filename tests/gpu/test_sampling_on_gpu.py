"""Drawn tokens on a GPU: the same alone, in a batch, captured, eager and speculated, and those of their own logits."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import runtime
from runtime.bench.shapes import random_model
from runtime.engine.decode import masking_stepper, stepper
from runtime.engine.prefill import prefill
from runtime.families.state import new_state
from runtime.kernels.gumbel import scores_torch
from runtime.kernels.token_mask import masked_torch, new_token_mask
from runtime.model.published import PUBLISHED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; this machine has none"),
]
# tests/test_gpu_tests.py runs this at toy size on a CPU, with others of these.
DEVICE, SMALL, SEQ, PROMPT, STEPS = "cuda", {"num_hidden_layers": 6}, 1024, 300, 24


def ids_of(model, count, seed=0):
    return random.Random(seed).choices(range(3, model.config.vocab), k=count)


@pytest.mark.parametrize("max_batch", [1, 8, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_drawn_tokens_follow_from_the_logits_of_greedy_steps(name, dtype, max_batch):
    """A step that draws computes the logits of one that does not, bit for bit, and its token is the best score's."""
    model = random_model(name, DEVICE, dtype, max_seq_len=SEQ, max_batch=max_batch, **SMALL)
    ids = ids_of(model, PROMPT)
    drawing, greedy = (new_state(model, max_batch, with_logits=True) for _ in range(2))
    for state in (drawing, greedy):
        prefill(model, state, 0, ids)
    seed, inverse_temperature = -(2**62) + 12345, 0.7
    drawing.seed[0], drawing.inverse_temperature[0] = seed, inverse_temperature
    draw, step = stepper(model, drawing.first_rows(1), samples=True), stepper(model, greedy.first_rows(1))
    for _ in range(STEPS):
        position = drawing.position[0].clone()
        draw()
        step()
        assert torch.equal(drawing.logits[0], greedy.logits[0])
        scores = scores_torch(drawing.logits[0], drawing.seed[0], position, drawing.inverse_temperature[0])
        assert int(drawing.token[0]) == int(scores.argmax())
        greedy.token[0], greedy.x[0] = drawing.token[0], drawing.x[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_answer_is_the_same_however_it_runs(dtype):
    model = random_model("gemma-3-270m", DEVICE, dtype, max_seq_len=SEQ, max_batch=8, **SMALL)
    ids, options = ids_of(model, PROMPT), {"max_new_tokens": STEPS, "ignore_eos": True, "temperature": 0.8, "seed": 5}
    alone = runtime.generate(model, ids, **options).token_ids
    eager = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=True))
    assert runtime.generate(eager, ids, **options).token_ids == alone
    assert runtime.generate(model, ids, **options, speculate="prompt").token_ids == alone
    filtered = [
        runtime.generate(each, ids, **options, top_p=0.9, speculate=speculate).token_ids
        for each in (model, eager)
        for speculate in (None, "prompt")
    ]
    assert len({*filtered}) == 1
    greedy = runtime.generate(model, ids, max_new_tokens=STEPS, ignore_eos=True).token_ids
    options |= {"temperature": [0.8, 0, 0.3, 0.8], "seed": [5, None, 6, 7]}
    batch = [result.token_ids for result in runtime.generate(model, [ids] * 4, **options)]
    assert batch[0] == alone and batch[1] == greedy and len(set(batch)) == 4


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inverse_temperature", [0.0, 0.7])
def test_picks_by_masks_follow_from_the_logits_of_greedy_steps(inverse_temperature, dtype, max_batch):
    """The masks come from pinned memory, between the layers' graph and the head's, and are others at each step."""
    model = random_model("gemma-3-270m", DEVICE, dtype, max_seq_len=SEQ, max_batch=max_batch, **SMALL)
    masking, greedy = (new_state(model, max_batch, with_logits=True) for _ in range(2))
    for state in (masking, greedy):
        prefill(model, state, 0, ids_of(model, PROMPT))
    masking.seed[0], masking.inverse_temperature[0] = 99, inverse_temperature
    mask = new_token_mask(1, model.config.vocab, torch.device("cpu"))
    host = mask.pin_memory() if DEVICE == "cuda" else mask
    pick = masking_stepper(
        model, masking.first_rows(1), lambda: masking.mask[0].copy_(host[0], non_blocking=True), samples=True
    )
    step, free = stepper(model, greedy.first_rows(1)), 0
    for at in range(STEPS):
        host.copy_(torch.randint(-(2**31), 2**31, host.shape, generator=torch.Generator().manual_seed(at)))
        position = masking.position[0].clone()
        pick()
        step()
        assert torch.equal(masking.logits[0], greedy.logits[0])
        numbers = masking.seed[0], position, masking.inverse_temperature[0]
        scores = scores_torch(greedy.logits[0], *numbers)
        assert int(masking.token[0]) == int(masked_torch(scores, masking.mask[0]).argmax())
        free += int(masking.token[0]) == int(scores.argmax())
        greedy.token[0], greedy.x[0] = masking.token[0], masking.x[0]
    assert free < STEPS

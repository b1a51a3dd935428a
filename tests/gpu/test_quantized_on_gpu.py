"""Models in int8 and int4 on a GPU: captured, in batches and after chunks of prompts, against eager steps, the CPU's
tokens and Hugging Face's on the exact values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import runtime
from runtime.bench.gates import first_rows_logits, gate
from runtime.bench.scale import FULL
from runtime.bench.shapes import random_model
from runtime.engine.prefill import prefill
from runtime.families.state import new_state
from runtime.model.published import PUBLISHED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; this machine has none"),
]
DEVICE, SCALE, SMALL = "cuda", FULL, {"num_hidden_layers": 3}
LENGTHS = (1, 128, 129, 600)
formats = pytest.mark.parametrize("to", ["int8", "int4"])
names = pytest.mark.parametrize("name", PUBLISHED)


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@formats
@names
def test_gate(name, to, dtype, max_batch):
    assert gate(SCALE.quantized(to), name, dtype, max_batch)["passed"]


@pytest.mark.parametrize("max_batch", [8, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@formats
@names
def test_a_rows_logits_are_the_same_at_every_number_of_rows(name, to, dtype, max_batch):
    """Bit for bit."""
    model = random_model(name, DEVICE, dtype, max_seq_len=1024, max_batch=max_batch, quantize=to, **SMALL)
    logits = [first_rows_logits(model, rows, 600) for rows in (1, 2, 3, 8, 64) if rows <= max_batch]
    assert all(torch.equal(logits[0], given) for given in logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@formats
@names
def test_a_captured_chunk_leaves_the_bits_of_an_uncaptured_one(name, to, dtype, recwarn):
    """Also that it needs no more memory than the plan's scratch, a matrix's values included."""
    model = random_model(name, DEVICE, dtype, max_seq_len=1024, quantize=to, **SMALL)
    eager = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=True))
    captured, plain = new_state(model, 1, with_logits=True), new_state(model, 1, with_logits=True)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, model.config.vocab, (length,), generator=generator).tolist() for length in LENGTHS]
    for round_ in range(2):  # the first of a length is not replayed yet
        for prompt in prompts:
            if DEVICE == "cuda" and round_ == 0 and prompt is not prompts[0]:  # whose libraries allocate once
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                prefill(model, captured, 0, prompt)
                assert torch.cuda.max_memory_allocated() - before <= model.plan.scratch, len(prompt)
            else:
                prefill(model, captured, 0, prompt)
            prefill(eager, plain, 0, prompt)
            for field in ("token", "position", "done", "x", "logits"):
                assert torch.equal(getattr(captured, field), getattr(plain, field)), (len(prompt), field)
    assert not recwarn.list, "a capture failed"


@formats
def test_the_demo_model_gives_the_tokens_of_the_cpu(to):
    """Real weights in fp32, past the sliding window; the CPU's tokens are Hugging Face's on the same values."""
    answers = []
    for device in ("cpu", DEVICE):
        model = runtime.load("demo", device=device, quantize=to, max_seq_len=1024, progress=False)
        assert model.dtype is torch.float32 and model.plan.weights == model.weights.nbytes
        ids = [*model.tokenizer.encode("The capital of France is"), *range(1000, 1560)]
        answers.append(runtime.generate(model, ids, max_new_tokens=64, ignore_eos=True).token_ids)
    assert answers[0] == answers[1]

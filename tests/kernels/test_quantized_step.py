"""Whole decode steps and chunks of prompts on matrices of integers with scales, on interpreted kernels: small models of
each family against Hugging Face on the exact values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import runtime
from runtime.engine import padded_chunk
from runtime.engine.decode import decode_step, stepper, tokens
from runtime.engine.graph import ops_of
from runtime.engine.prefill import Prefill, logits
from runtime.errors import InvalidArgument
from runtime.families.state import new_state
from runtime.kernels import chunk_attention, dequantize, rotate_heads, store_chunk
from runtime.kernels.chunk_attention import ChunkBlock
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.scaled_matrix import ScaledMatrix
from runtime.parity.teacher_forcing import force_token

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETING,
        reason="for TRITON_INTERPRET=1 (tests/test_interpreter.py); tests/gpu has whole steps on a GPU",
    ),
    pytest.mark.newest_only,
    pytest.mark.usefixtures("few_splits", "large_blocks"),
]
# Each family once among the main cases, and the other format in the sweep.
MAIN = [("gemma", "int8"), ("gemma2", "int4"), ("gemma3", "int4")]
OTHERS = [("gemma", "int4"), ("gemma2", "int8"), ("gemma3", "int8")]
NEW = 6


def chunked(model, state, row, ids):
    """Fills a row by chunks that are padded, as on a GPU."""
    prompt = Prefill(model, state, row, ids, in_buckets=True)
    while not prompt.is_done:
        prompt.advance()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Blocks of the chunk's kernels that the interpreter is quick with, and chunks of up to 12 tokens."""
    for module, name in ((rotate_heads, "BLOCK_ROWS"), (store_chunk, "BLOCK_TOKENS"), (dequantize, "BLOCK_ROWS")):
        monkeypatch.setattr(module, name, 128)
    monkeypatch.setattr(chunk_attention, "chunk_block", lambda *_: ChunkBlock(32, 16, 4, 1))
    monkeypatch.setattr(padded_chunk, "BUCKETS", (10,))


def assert_tokens_are_hugging_faces(pair, ids):
    """Of a prompt in chunks, past a window, and of the steps after it; the head is no copy of the embedding."""
    limits = dataclasses.replace(pair.ours.runtime, prefill_chunk=12)
    model = dataclasses.replace(pair.ours, runtime=limits)
    assert padded_chunk.is_fused(model) and isinstance(model.weights.embedding, ScaledMatrix)
    expected, _ = pair.hf_greedy(ids, NEW)
    assert len(set(expected)) > NEW // 2
    state = new_state(model, 1)
    for buffer in (*state.cache.keys, *state.cache.values):
        buffer.fill_(torch.nan)
    chunked(model, state, 0, ids)
    assert [state.token.item(), *(row[0] for row in tokens(stepper(model, state), state, NEW - 1))] == expected


@pytest.mark.parametrize(("family", "to"), MAIN)
def test_fp32_tokens_are_hugging_faces(family, to, quantized_pair, random_ids):
    assert_tokens_are_hugging_faces(quantized_pair(family, to), random_ids(21))


@pytest.mark.parametrize(("family", "to"), OTHERS)
def test_tokens_of_the_other_format_are_hugging_faces(family, to, quantized_pair, random_ids):
    assert_tokens_are_hugging_faces(quantized_pair(family, to), random_ids(21))


def test_a_head_of_its_own(quantized_pair, random_ids):
    pair = quantized_pair("gemma3", "int4", tie_word_embeddings=False)
    assert pair.ours.weights.head is not pair.ours.weights.embedding
    assert pair.greedy(random_ids(12), NEW)[0] == pair.hf_greedy(random_ids(12), NEW)[0]


@pytest.mark.parametrize(
    ("to", "dtype"), [("int8", torch.bfloat16), ("int4", torch.bfloat16), ("int4", torch.float32)], ids=str
)
def test_a_rows_bits_are_the_same_alone_and_among_others(to, dtype, quantized_pair, random_ids):
    """In 16 bits in the form that a model of several rows has, which multiplies them on tensor cores."""
    model, found = quantized_pair("gemma2", to, dtype).ours, {}
    prompts = [random_ids(6, seed) for seed in range(3)]
    for rows in (1, 3):
        state = new_state(model, rows, with_logits=True)
        for row in range(rows):
            chunked(model, state, row, prompts[row])
        for _ in range(2):
            decode_step(ops_of(model), model, state)
        found[rows] = state.logits[0].clone()
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_bf16_is_as_near_the_truth_as_hugging_face_on_rounded_weights(to, quantized_pair, random_ids):
    """By all logits of a chunk, whose weights are rounded to bf16 as Hugging Face's, and of steps, whose are not."""
    exact, pair = quantized_pair("gemma3", to).hf, quantized_pair("gemma3", to, torch.bfloat16)
    errors = {"ours": 0.0, "hugging face": 0.0, "our chunk": 0.0, "hugging face's": 0.0}
    for seed in range(2):
        ids = random_ids(24, seed)
        prompt, text = ids[:16], torch.tensor([ids])
        with torch.inference_mode():
            truth, theirs = (hf(text).logits[0].float() for hf in (exact, pair.hf))
        hidden = torch.empty(len(prompt), pair.ours.config.hidden, dtype=torch.bfloat16)
        state = new_state(pair.ours, 1, with_logits=True)
        filled = Prefill(pair.ours, state, 0, prompt, hidden_out=hidden, in_buckets=True)
        while not filled.is_done:
            filled.advance()
        steps = []
        for token in ids[16:]:
            force_token(pair.ours, state, token)
            decode_step(ops_of(pair.ours), pair.ours, state)
            steps.append(state.logits[0].float().clone())
        for name, given, expected in (
            ("our chunk", logits(pair.ours, hidden).float(), truth[:16]),
            ("hugging face's", theirs[:16], truth[:16]),
            ("ours", torch.stack(steps), truth[16:]),
            ("hugging face", theirs[16:], truth[16:]),
        ):
            errors[name] += (given - expected).pow(2).mean().sqrt().item()
    assert errors["our chunk"] <= 1.25 * errors["hugging face's"], errors
    assert errors["ours"] <= 1.25 * errors["hugging face"], errors


def test_answers_that_are_drawn_and_speculated_are_those_of_plain_steps(quantized_pair):
    model = quantized_pair("gemma3", "int4").ours
    ids, options = [5, 6, 7, 8] * 3, {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0.8, "seed": 3}
    plain = runtime.generate(model, ids, **options).token_ids
    assert runtime.generate(model, ids, **options, speculate="prompt").token_ids == plain
    assert runtime.generate(model, ids, **options | {"temperature": 0}).token_ids != plain


def test_a_gguf_files_own_blocks_are_refused():
    with pytest.raises(InvalidArgument, match=r"one of .'int8', 'int4'. under TRITON_INTERPRET=1, got 'gguf'"):
        runtime.load("demo", device="cpu", quantize="gguf", progress=False)

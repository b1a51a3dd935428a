"""Whole decode steps and chunks of prompts on matrices of integers with scales, on interpreted kernels and in plain
PyTorch: small models of each family against Hugging Face on the exact values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import runtime
from runtime.engine import padded_chunk
from runtime.engine.decode import decode_step, stepper, tokens
from runtime.engine.graph import ops_of
from runtime.engine.prefill import Prefill, logits, prefill
from runtime.families.state import new_state
from runtime.kernels import chunk_attention, rotate_heads, store_chunk
from runtime.kernels.chunk_attention import ChunkBlock
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.ops import TorchOps
from runtime.kernels.scaled_matrix import ScaledMatrix

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETING,
        reason="for TRITON_INTERPRET=1 (tests/test_interpreter.py); tests/gpu has whole steps on a GPU",
    ),
    pytest.mark.usefixtures("few_splits", "large_blocks"),
]
families = pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
formats = pytest.mark.parametrize("to", ["int8", "int4"])
NEW = 24


@formats
@families
def test_fp32_tokens_are_hugging_faces(family, to, quantized_pair, random_ids):
    pair, ids = quantized_pair(family, to), random_ids(12)
    weights = pair.ours.weights
    assert weights.formats == {"int8": "int8", "int4": "int8 + int4"}[to]
    assert isinstance(weights.head, ScaledMatrix) and weights.head is weights.embedding
    assert pair.ours.plan.weights == pair.ours.plan.weights_read == weights.nbytes
    expected, _ = pair.hf_greedy(ids, NEW)
    assert len(set(expected)) >= 8
    assert pair.greedy(ids, NEW)[0] == expected

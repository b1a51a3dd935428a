"""Faults planted in the kernels of a prompt's chunk: each is refused by the comparison that the healthy kernel passes
in test_chunk_kernels.py."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import InterpreterError

from runtime.check.chunk_cases import CASES
from runtime.kernels.launch import INTERPRETING

from .test_planted_in_kernels import (
    exact_gelu,
    halves_rounded_once,
    plant,
    rewritten,
    scores_without_cap,
    scores_without_roundings,
)

pytestmark = [
    pytest.mark.newest_only,  # about the comparisons
    pytest.mark.filterwarnings("ignore:All-NaN slice"),  # padding is NaN
    pytest.mark.skipif(not INTERPRETING, reason="takes a kernel apart: TRITON_INTERPRET=1 (tests/test_interpreter.py)"),
]
BF16 = torch.bfloat16

RING = "chunk_attention window shorter than the chunk, round the ring"
FULL = "chunk_attention mha, head_dim 80"
LONG = "chunk_attention window longer than the chunk, round the ring"
CAPPED = "chunk_attention softcap, window"
# The case, the function, what stands in it and what takes its place.
WRITTEN = {
    "an older key too many": (
        RING,
        "chunk_attention_kernel",
        "(start + place - window)",
        "(start + place - window - 1)",
    ),
    "an older key too few": (
        RING,
        "chunk_attention_kernel",
        "(start + place - window)",
        "(start + place - window + 1)",
    ),
    "an own key too many": (RING, "chunk_attention_kernel", "> (place - window)", ">= (place - window)"),
    "the key after the query": (FULL, "chunk_attention_kernel", "<= place[:, None]", "<= place[:, None] + 1"),
    "the query's own key left out": (FULL, "chunk_attention_kernel", "<= place[:, None]", "< place[:, None]"),
    "the oldest key left out": (RING, "chunk_attention_kernel", "- window + 1  #", "- window + 2  #"),
    "padding's values multiplied by zero": (RING, "chunk_attention_kernel", "(own < end)", "(own < seq)"),
    "slots of another ring": (LONG, "chunk_attention_kernel", "(position % slots)", "(position % (slots - 1))"),
    "another row's cache": (FULL, "chunk_attention_kernel", "(row * KV_HEADS", "(0 * KV_HEADS"),
    "another head's keys": (FULL, "chunk_attention_kernel", "(HEADS + kv_head) * HEAD_DIM", "HEADS * HEAD_DIM"),
    "heads dealt out in turn": (
        RING,
        "chunk_attention_kernel",
        "kv_head * GROUP + at % GROUP",
        "at % GROUP * KV_HEADS + kv_head",
    ),
    "the output not rescaled": (LONG, "attended", "acc * shrink[:, None]", "acc"),
    "the sum not rescaled": (LONG, "attended", "total * shrink", "total"),
    "no key seen yet": (RING, "attended", 'tl.where(raised == float("-inf"), 0.0, raised)', "raised"),
    "positions that begin at zero": ("rotate_heads", "rotate_part", "(start + tl.minimum", "(tl.minimum"),
    "heads rotated as their neighbours": (
        "rotate_heads",
        "rotate_part",
        "at // PART_HEADS, FIRST",
        "at % PART_HEADS, FIRST",
    ),
    "keys with the queries' norm": (
        "rotate_heads, norms, head_dim 80",
        "rotate_heads_kernel",
        "k_norm_ptr,\n            start",
        "q_norm_ptr,\n            start",
    ),
    "padding stored": ("store_chunk", "store_chunk_kernel", "(token < count)", "(token >= 0)"),
    "stored from the first slot on": ("store_chunk", "store_chunk_kernel", "(start + token)", "token"),
    "the oldest of a long chunk stored alone": (
        "store_chunk longer than the ring",
        "store_chunk_kernel",
        "token >= count - slots",
        "token < slots",
    ),
    "values stored as keys": (
        "store_chunk",
        "store_chunk_kernel",
        "tl.load(k_at,",
        "tl.load(k_at + KV_HEADS * HEAD_DIM,",
    ),
    "gate and up exchanged": ("gated_product", "gated_product_kernel", "gated(gate, up,", "gated(up, gate,"),
    "the next group's scale": ("dequantize 5x384, int4", "row_of_words", ">> 16 * group)", ">> 16 * (group ^ 1))"),
    "a zero point off by one": ("dequantize 5x384, int4", "row_of_words", "& 15) - 8)", "& 15) - 7)"),
    "one row's scale for all": ("dequantize 5x1100, int8", "dequantize_kernel", "scale_ptr + at", "scale_ptr + 0 * at"),
    "the branch added before its rounding": (
        "residual_norm, branch",
        "residual_pieces",
        "(x[i] + branch[i]).to(dtype).to(tl.float32)",
        "x[i] + branch[i]",
    ),
    "the branch not added": ("residual_norm, branch", "residual_pieces", "(x[i] + branch[i])", "x[i]"),
}
PLANTED = {
    "exact GELU": ("gated_product", "gelu_tanh", exact_gelu),
    "halves rounded once": ("rotate_heads", "rotated_halves", halves_rounded_once),
    "no cap": (CAPPED, "finished_scores", scores_without_cap),
    "scores not rounded": (CAPPED, "finished_scores", scores_without_roundings),
}


@pytest.mark.parametrize("fault", [*WRITTEN, *PLANTED])
def test_a_fault_in_a_kernel_is_refused(fault, monkeypatch, tmp_path):
    case, name, *texts = (WRITTEN | PLANTED)[fault]
    faulty = texts[0] if fault in PLANTED else rewritten(monkeypatch, tmp_path, name, *texts)
    call = CASES[case](BF16)
    plant(monkeypatch, name, faulty)
    given = call.run(call.kernel)
    with pytest.raises(AssertionError):
        call.compare(given)


@pytest.mark.parametrize(
    ("case", "name", "right", "wrong"),
    [
        ("rotate_heads", "rotate_part", "tl.minimum(token, count - 1)", "token"),
        ("rotate_heads, norms, head_dim 80", "rotate_part", "(token < seq)", "(token >= 0)"),
        (FULL, "chunk_attention_kernel", "(own < end)", "(own >= 0)"),
        ("dequantize 5x384, int4", "dequantize_kernel", "(rows < OUTPUTS)", "(rows >= 0)"),
    ],
    ids=["angles of padding", "tokens past the chunk", "keys past the chunk", "rows past the matrix"],
)
def test_a_mask_left_out_is_caught(case, name, right, wrong, monkeypatch, tmp_path):
    call = CASES[case](BF16)
    plant(monkeypatch, name, rewritten(monkeypatch, tmp_path, name, right, wrong))
    with pytest.raises(InterpreterError, match="OutOfBounds"):
        call.run(call.kernel)


def test_the_order_of_programs_changes_nothing_that_is_stored(monkeypatch, tmp_path):
    """Each slot of a ring is stored once, by whichever program comes first."""
    backwards = "(tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_TOKENS"
    text = "store_chunk_kernel", "tl.program_id(0) * BLOCK_TOKENS", backwards
    plant(monkeypatch, text[0], rewritten(monkeypatch, tmp_path, *text))
    call = CASES["store_chunk longer than the ring"](BF16)
    call.compare(call.run(call.kernel))

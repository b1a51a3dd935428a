"""The calls that every kernel is tested on, by name. Their sizes are whole blocks or not: 84 and 200 columns in blocks
of 128 and 256, 301 tokens in blocks of 64, 37 and 130 outputs in blocks of 64 and 32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from runtime.check.attention_cases import LARGE_SCORES, attention_case, pair_case
from runtime.check.case import Case
from runtime.check.head_cases import (
    head_below_zero,
    head_case,
    head_of_equal_rows,
    head_of_ties,
    head_that_overflows,
    head_with_a_masked_nan,
    head_with_a_nan,
    masked_head,
    sampled_head,
)
from runtime.check.step_cases import (
    advance_case,
    advance_of_none,
    far_below_zero_case,
    linear_case,
    norm_case,
    projection_case,
)

Make = Callable[[torch.dtype], Case]

WINDOW = 40
# No older key, one, and before, at and after the end of blocks of keys (8 or 4, for tensor cores 32 or 16; on a CPU 64)
# and the window; and rings that have gone round.
POSITIONS = {
    "first block": (0, 1, 4, 7, 8),
    "more blocks": (9, 63, 64),
    "window": (WINDOW - 2, WINDOW - 1, WINDOW),
    "round the ring": (3 * WINDOW, 7, 96),
}
# heads, kv_heads, head_dim, window and options of decode_attention
ATTENTION: dict[str, tuple[Any, ...]] = {
    "mqa, head_dim 256": (4, 1, 256, None, {}),
    "gqa, window": (4, 2, 64, WINDOW, {}),
    "window in a longer cache": (4, 2, 64, WINDOW, {"spare_slots": 9}),
    "q/k norm, head_dim 80": (4, 1, 80, WINDOW, {"qk_norm": True}),
    "mha, q/k norm, head_dim 128": (2, 2, 128, None, {"qk_norm": True}),
    "softcap": (4, 2, 64, WINDOW, {"softcap": 50.0, "scale": 20**-0.5, "spread": 2.0}),
}


def _projection(name: str, rows: int, outputs: int, width: int, branched: bool, dtype: torch.dtype) -> Case:
    return projection_case(name, rows, outputs, width, dtype, branched)


def projections(name: str) -> dict[str, Make]:
    return {
        f"{name} {outputs}x{width}{', branch' if branched else ''}": partial(
            _projection, name, rows, outputs, width, branched
        )
        for rows, outputs, width in ((3, 64, 128), (8, 37, 84), (3, 130, 200))
        for branched in (False, True)
    }


MATRICES: dict[str, Make] = {
    "rms_norm": lambda dtype: norm_case(5, 84, dtype, with_residual=False),
    "rms_norm, residual": lambda dtype: norm_case(5, 84, dtype, with_residual=True),
    **projections("qkv_projection"),
    **projections("gated_mlp"),
    "gated_mlp, far below zero": far_below_zero_case,
    "residual_linear 64x128": lambda dtype: linear_case(3, 64, 128, dtype, with_residual=False),
    "residual_linear 64x128, residual": lambda dtype: linear_case(3, 64, 128, dtype, with_residual=True),
    "residual_linear 37x84": lambda dtype: linear_case(8, 37, 84, dtype, with_residual=False),
    "residual_linear, residual": lambda dtype: linear_case(3, 130, 200, dtype, with_residual=True),
    "lm_head_argmax": lambda dtype: head_case(3, 301, 84, dtype),
    "lm_head_argmax, branch": lambda dtype: head_case(3, 301, 84, dtype, branched=True),
    "lm_head_argmax, softcap": lambda dtype: head_case(3, 301, 84, dtype, softcap=30.0),
    "lm_head_argmax, branch, softcap": lambda dtype: head_case(3, 301, 84, dtype, branched=True, softcap=30.0),
    "lm_head_argmax, sampled": lambda dtype: sampled_head(5, 301, 84, dtype),
    "lm_head_argmax, masked, softcap": lambda dtype: masked_head(5, 301, 84, dtype, softcap=30.0),
    "lm_head_argmax, below zero": head_below_zero,
    "lm_head_argmax, equal rows": head_of_equal_rows,
    "lm_head_argmax, ties of 16 bits": head_of_ties,
    "lm_head_argmax, overflow": head_that_overflows,
    "lm_head_argmax, NaN": head_with_a_nan,
    "lm_head_argmax, NaN, masked": head_with_a_masked_nan,
    "advance": lambda dtype: advance_case(4, 84, dtype),
    "advance, none picked": advance_of_none,
}


def attention(shape: str, positions: tuple[int, ...], dtype: torch.dtype) -> Case:
    heads, kv_heads, head_dim, window, options = ATTENTION[shape]
    return attention_case(positions, heads, kv_heads, head_dim, window, dtype, **options)


def large_scores(dtype: torch.dtype) -> Case:
    """Rows enough that their errors are alike from one machine to the next, and a scale that is no power of two."""
    positions = tuple(range(WINDOW - 11, WINDOW + 1))
    return attention_case(positions, 4, 2, 80, WINDOW, dtype, spread=LARGE_SCORES)


def attention_and_projection(dtype: torch.dtype) -> Case:
    """Few keys, all of one weight: the first rounding is that of the attention's output, which shows then."""
    return pair_case(attention_case((1, 2, 3, 5, 7, 9), 4, 2, 64, None, dtype, spread=0.0), 130, looser={})


CASES: dict[str, Make] = MATRICES | {
    f"decode_attention {shape}, {where}": partial(attention, shape, positions)
    for shape in ATTENTION
    for where, positions in POSITIONS.items()
}
CASES["decode_attention, large scores"] = large_scores
CASES["attention_and_projection, equal weights"] = attention_and_projection

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtypes_of(name: str) -> list[str]:
    """The dtypes that a case has something to say in."""
    return [dtype for dtype, kind in FLOATS.items() if "16 bits" not in name or kind.itemsize == 2]

"""Fewer splits of attention's keys, so that few keys fill them."""

from __future__ import annotations

import pytest

from runtime.kernels import attention_splits
from runtime.kernels.launch import INTERPRETING

# A program takes the interpreter some milliseconds, so that some tests have fewer splits there, which grow sooner.
FEW_SPLITS = 4 if INTERPRETING else attention_splits.WARP_SPLITS.few


def limit_splits(patch: pytest.MonkeyPatch, few: int, **beyond: int) -> None:
    """Lets attention have at most so many splits of older keys, a power of 2: in every row, or in those that are short
    by what `beyond` sets of a SplitPlan."""
    for name in ("WARP_SPLITS", "GROUP_SPLITS"):
        plan = getattr(attention_splits, name)
        fewer = min(plan.few, few)
        patch.setattr(attention_splits, name, plan._replace(**{"few": fewer, "most": fewer} | beyond))

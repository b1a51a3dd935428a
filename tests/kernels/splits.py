"""Fewer splits of attention's keys, so that few keys fill them."""

from __future__ import annotations

import importlib

import pytest

from runtime.kernels.attention_splits import MAX_SPLITS
from runtime.kernels.launch import INTERPRETING

# A program takes the interpreter some milliseconds, so that some tests have fewer splits there, which grow sooner.
FEW_SPLITS = 4 if INTERPRETING else MAX_SPLITS


def limit_splits(patch: pytest.MonkeyPatch, most: int) -> None:
    """Lets attention have at most so many splits of older keys, a power of 2."""
    for name in ("kernels.attention_splits", "kernels.decode_attention", "families.state"):
        patch.setattr(importlib.import_module(f"runtime.{name}"), "MAX_SPLITS", most)
    group = importlib.import_module("runtime.kernels.decode_attention")
    patch.setattr(group, "GROUP_SPLITS", min(group.GROUP_SPLITS, most))

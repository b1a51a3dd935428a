"""Gemma 2: norms before and after each branch, every other layer sliding, softcaps on scores and logits."""

from __future__ import annotations

from runtime.families.sandwich import decode_layers, prefill_layers

__all__ = ["decode_layers", "prefill_layers"]

"""Gemma 3, text: as Gemma 2, with norms on queries and keys and no softcap on scores. Most layers are sliding, and have
a rotary base of their own."""

from __future__ import annotations

from runtime.families.sandwich import decode_layers, prefill_layers

__all__ = ["decode_layers", "prefill_layers"]

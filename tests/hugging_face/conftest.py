"""Small random models of transformers that decode by this runtime, beside transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import runtime


@dataclass
class Drop:
    """One checkpoint as transformers runs it, and with our `generate`."""

    theirs: Any
    ours: Any


@pytest.fixture(scope="session")
def drop_in(small_pair: Callable[..., Any]) -> Callable[[str], Drop]:
    """A function that makes (once per session) both models of a family."""
    made: dict[str, Drop] = {}

    def make(family: str) -> Drop:
        if family not in made:
            pair = small_pair(family)
            ours = runtime.load(
                pair.ours.name, interface="hf", device="cpu", max_seq_len=256, max_batch=4, progress=False
            )
            made[family] = Drop(pair.hf, ours)
        return made[family]

    return make

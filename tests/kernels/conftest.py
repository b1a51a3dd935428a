"""Random numbers that repeat, and the interpreter that every kernel test runs in where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from runtime.check.interpreter import checked_interpreter
from runtime.kernels.launch import INTERPRETING

from .splits import FEW_SPLITS, limit_splits


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> Iterator[None]:
    """Triton's interpreter with its bf16 mended and every address checked; nothing where kernels are compiled."""
    with checked_interpreter() if INTERPRETING else nullcontext():
        yield


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than FEW_SPLITS."""
    limit_splits(monkeypatch, FEW_SPLITS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)

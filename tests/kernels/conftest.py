"""Random numbers that repeat."""

from __future__ import annotations

import pytest
import torch

from .splits import FEW_SPLITS, limit_splits


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than FEW_SPLITS."""
    limit_splits(monkeypatch, FEW_SPLITS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)

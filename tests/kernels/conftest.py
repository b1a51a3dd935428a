"""Random numbers that repeat, and the interpreter that every kernel test runs in where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from runtime.kernels.launch import INTERPRETING

from .cases import FEW_SPLITS, limit_splits
from .interpreter import check_memory, patch_language_once, repair_bf16


@pytest.fixture(autouse=True, scope="session")
def checked_interpreter() -> Iterator[None]:
    """Triton's interpreter with its bf16 mended and every address checked; nothing where kernels are compiled."""
    # Lanes that a mask leaves out compute what they will, on a GPU without a word.
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        if INTERPRETING:
            repair_bf16(patch)
            check_memory(patch)
            patch_language_once(patch)
        yield


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than FEW_SPLITS."""
    limit_splits(monkeypatch, FEW_SPLITS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)

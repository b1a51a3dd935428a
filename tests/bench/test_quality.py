"""The benchmark of quality: Hugging Face's perplexity on the same weights, and texts that any Python has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from runtime.bench import quality

pytestmark = pytest.mark.newest_only


def test_it_is_hugging_faces(small_pair: Callable[..., Any], random_ids: Callable[..., list[int]]) -> None:
    pair = small_pair("gemma3")
    windows = [random_ids(50, seed=1), random_ids(40, seed=2)]
    total = 0.0
    for window in windows:
        with torch.no_grad():
            logits = pair.hf(torch.tensor([window])).logits[0].double()
        total += float(F.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="sum"))
    expected = float(torch.tensor(total / (sum(map(len, windows)) - 2)).exp())
    assert quality.perplexity(pair.ours, windows) == pytest.approx(expected, rel=1e-5)


def test_the_text_is_pythons_own() -> None:
    text = quality.text()
    assert text.startswith("The Zen of Python, by Tim Peters\n\nBeautiful is better than ugly.")
    assert 20_000 < len(text) < 60_000 and "Generic socket server classes." in text
    assert text == quality.text()


def test_the_tasks_are_of_pythons_own_texts() -> None:
    words, functions = quality.last_words(50), quality.docstrings(50)
    assert len(words) == len(functions) == 50
    for row in words:
        assert 19 <= len(row["before"].split()) < 60 and row["word"].isalpha()
    rights = [row["choices"][row["answer"]] for row in functions]
    assert len(set(rights)) == 50 and {row["answer"] for row in functions} == set(range(quality.CHOICES))
    for row in functions:
        assert row["definition"].startswith("def ") and len(set(row["choices"])) == quality.CHOICES

"""The masks of a step's rows: which tokens their grammars allow next, written by the host for the head to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from runtime.engine.answer import Answer
from runtime.families.state import DecodeState


class Masks:
    """Writes the masks of a state's rows, on a GPU by way of pinned memory, so that the host does not wait.

    Args:
        state: of all rows. Rows without a grammar keep the mask that they were given with their request.
    """

    def __init__(self, state: DecodeState) -> None:
        self._mask = state.mask
        is_on_host = self._mask.is_cpu
        self._host = self._mask if is_on_host else torch.empty_like(self._mask, device="cpu", pin_memory=True)
        self._words: np.ndarray = self._host.numpy()

    @torch.inference_mode()
    def fill(self, answers: Sequence[Answer]) -> None:
        """Writes the masks of answers, the first one's in the first row. All their tokens so far must have been handed
        out: then every earlier step on a GPU has read its own masks."""
        for row, answer in enumerate(answers):
            if answer.choice and not answer.is_over:
                answer.choice.write_mask(self._words[row])
                if self._host is not self._mask:
                    self._mask[row].copy_(self._host[row], non_blocking=True)

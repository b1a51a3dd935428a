"""Checks guesses on a CPU: an answer's last token and guesses at those after it run as a short chunk of the compiled
kernels."""

from __future__ import annotations

import torch

from runtime.engine.answer import Answer
from runtime.engine.first_token import make_ready
from runtime.engine.guesses import Checked, checked
from runtime.engine.short_chunk import MOST_PICKED, next_tokens
from runtime.families.ring_backup import RingBackup
from runtime.families.state import DecodeState
from runtime.kernels.argmax import NO_TOKEN
from runtime.model.model import Model


class GuessChunk:
    """Takes steps of up to MOST_PICKED tokens for the sequence in a state's first row."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        self._backup = RingBackup(state.cache, MOST_PICKED)

    @torch.inference_mode()
    def check(self, model: Model, answer: Answer, guesses: list[int]) -> Checked:
        """Runs the answer's last token and guesses at those after it, and leaves the row as plain steps would. What the
        first wrong guess and later ones have left in the cache is overwritten by the next steps or, in a ring, replaced
        by what was there before.

        Returns:
            As `checked`.
        """
        state, start = self._state, len(answer.prompt) + len(answer.token_ids) - 1
        ids = torch.tensor([answer.token_ids[-1], *guesses], device="cpu")
        self._backup.keep(0, start + 1, start + len(ids))
        picked, logits = next_tokens(model, state, 0, ids, start, answer.sampling.samples)
        found = checked(answer, picked.tolist(), logits, guesses)
        count = max(1, len(found.tokens))  # if the choice fails at once, nobody reads the row
        if count < len(ids):
            self._backup.restore(start + count)
        row, end, last = (
            torch.zeros(1, dtype=torch.int64, device="cpu"),
            torch.tensor([start + count], device="cpu"),
            slice(count - 1, count),
        )
        token = torch.tensor(found.tokens[-1:] or [NO_TOKEN], device="cpu")
        make_ready(model, state, row, end, token, None if logits is None else logits[last])
        state.step.add_(1)
        return found

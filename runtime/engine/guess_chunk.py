"""Guesses as a short chunk in a CPU's compiled kernels: its tokens are an answer's last one and guesses at those after
it."""

from __future__ import annotations

import torch

from runtime.engine.answer import Answer
from runtime.engine.first_token import make_ready
from runtime.engine.short_chunk import MOST_PICKED, next_tokens
from runtime.families.ring_backup import RingBackup
from runtime.families.state import DecodeState
from runtime.kernels.argmax import NO_TOKEN
from runtime.model.model import Model


class GuessChunk:
    """The steps of the sequence in a state's first row, of up to MOST_PICKED tokens."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        self._backup = RingBackup(state.cache, MOST_PICKED)

    @torch.inference_mode()
    def check(self, model: Model, answer: Answer, guesses: list[int]) -> list[int]:
        """Runs the answer's last token and guesses at those after it, and leaves the row as plain steps would. What
        later rows than the first wrong guess have left in the cache is overwritten by the next steps or, in a ring, put
        back.

        Returns:
            The answer's next tokens: the right guesses up to the first wrong one or a stop token, then the model's own
            token; NO_TOKEN where its logits are not finite.
        """
        state, start = self._state, len(answer.prompt) + len(answer.token_ids) - 1
        ids = torch.tensor([answer.token_ids[-1], *guesses])
        self._backup.keep(0, start + 1, start + len(ids))
        picked, logits = next_tokens(model, state, 0, ids, start, answer.sampling.samples)
        tokens = picked.tolist()
        count = _right(tokens, guesses, {NO_TOKEN, *answer.stop_ids})
        if count < len(ids):
            self._backup.restore(start + count)
        last = slice(count - 1, count)
        row, end = torch.zeros(1, dtype=torch.int64), torch.tensor([start + count])
        make_ready(model, state, row, end, picked[last], None if logits is None else logits[last])
        state.step.add_(1)
        return tokens[:count]


def _right(tokens: list[int], guesses: list[int], ends: set[int]) -> int:
    """How many of the model's tokens plain steps would have picked: those after right guesses, up to one that ends."""
    for place, guess in enumerate(guesses):
        if tokens[place] != guess or tokens[place] in ends:
            return place + 1
    return len(tokens)

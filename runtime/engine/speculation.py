"""Speculation: guesses at an answer's next tokens, checked in one step, whose rows are successive positions.

The first row holds the answer's last token, the others the guesses, and each picks the model's own token after its own.
As long as the guesses are what the model picks, these are the tokens of as many plain steps, bit for bit, since a row
has the same bits however many share the step. The first wrong guess ends that: the model's own token stands in its
place, and what later rows have left in the cache is overwritten by the next steps or, in a ring, put back.

Reading the weights takes most of a step's time, so a few rows cost little more than one. How many guesses are checked
follows from how often such guesses were right and from what steps of so many rows have taken; often it is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from runtime.engine.answer import Answer
from runtime.engine.drafts import Drafts
from runtime.engine.first_token import make_ready
from runtime.engine.graph import runs_compiled
from runtime.engine.short_chunk import MOST_PICKED, next_tokens
from runtime.engine.step_cost import StepCost
from runtime.families.ring_backup import RingBackup
from runtime.families.state import DecodeState
from runtime.kernels.argmax import NO_TOKEN
from runtime.model.model import Model

LEAST_GAIN = 1.02  # expected of guesses that are checked: the host's part takes time too


def can_speculate(model: Model) -> bool:
    """Whether a model checks guesses: it runs a CPU's compiled kernels. Others decode plainly, to the same tokens."""
    return runs_compiled(model)


class Speculation:
    """Takes the steps of an answer that has the model to itself.

    Args:
        state: of all rows; the answer's is the first.
    """

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        # Each position of a step has a slot of its own, in every ring.
        slots = min(buffer.shape[2] for buffer in state.cache.keys)
        self._most = min(MOST_PICKED, slots) - 1
        self._backup = RingBackup(state.cache, MOST_PICKED)
        self._cost = StepCost()
        self._drafts = Drafts()
        self._prompt_tokens = 0
        self._new_ids: list[int] | None = None  # of the answer that the drafts are for

    def step(self, model: Model, answer: Answer, plain_step: Callable[[], None]) -> list[Any]:
        """Takes the answer's next step, which gives it one token or more. All before have been handed out to it.

        Args:
            model: the model.
            answer: whose next tokens are wanted: at least one more.
            plain_step: takes a plain step of the answer's row.

        Returns:
            The tokens, an array [1] each: no more than the answer may have, the last one perhaps a stop token or
            NO_TOKEN.
        """
        guesses = self.guesses(answer, answer.max_new_tokens - len(answer.token_ids) - 1)
        started = time.perf_counter()
        if guesses:
            tokens = list(self.check(model, answer, guesses)[:, None])
        else:
            plain_step()
            tokens = [self._state.token_array[:1]]
        self._cost.timed(1 + len(guesses), time.perf_counter() - started)
        return tokens

    def guesses(self, answer: Answer, most: int) -> list[int]:
        """The guesses that are worth checking, at most `most`."""
        drafts = self._drafts_of(answer)
        match, most = drafts.match(), min(most, self._most)
        if not match.length or not self._cost.is_known:
            return []
        count, gain = 0, LEAST_GAIN
        chance = tokens = 1.0  # that all guesses so far are right; the step's tokens to be expected
        for guesses in range(1, most + 1):
            chance *= drafts.chance(match.length + guesses - 1)  # each right one makes the match longer
            tokens += chance
            if tokens / self._cost.of(1 + guesses) > gain:
                count, gain = guesses, tokens / self._cost.of(1 + guesses)
        return drafts.after(match, count)

    def _drafts_of(self, answer: Answer) -> Drafts:
        if self._new_ids is not answer.token_ids:  # another answer, or one that began anew, has a list of its own
            self._drafts, self._prompt_tokens = Drafts(answer.prompt), len(answer.prompt)
            self._new_ids = answer.token_ids
        self._drafts.extend(answer.token_ids[len(self._drafts) - self._prompt_tokens :])
        return self._drafts

    @torch.inference_mode()
    def check(self, model: Model, answer: Answer, guesses: list[int]) -> np.ndarray[Any, Any]:
        """Runs the answer's last token and guesses at those after it, and leaves its row as plain steps would.

        Returns:
            The answer's next tokens, int64: the right guesses up to the first wrong one or a stop token, then the
            model's own token; NO_TOKEN where its logits are not finite.
        """
        state, start = self._state, len(answer.prompt) + len(answer.token_ids) - 1
        ids = torch.tensor([answer.token_ids[-1], *guesses])
        self._backup.keep(0, start + 1, start + len(ids))
        picked, logits = next_tokens(model, state, 0, ids, start)
        tokens: np.ndarray[Any, Any] = picked.numpy().copy()
        count = _right(tokens.tolist(), guesses, {NO_TOKEN, *answer.stop_ids})
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

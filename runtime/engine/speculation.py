"""Speculative decoding: guesses at an answer's next tokens, checked in one step whose rows are successive positions.

The first row holds the answer's last token, the others the guesses, and each row picks the model's own next token. An
answer that chooses its tokens itself chooses row by row, from the logits after the tokens chosen so far (guesses.py).
As long as the guesses equal the picks, these are the tokens of as many plain steps, since a row has the same bits
however many rows share the step. The first wrong guess ends that: the model's own token takes its place, and the cache
is left as if that row and later ones had not run. A CPU's compiled kernels run such a step as a short chunk
(guess_chunk.py), Triton's as a step of its own kind (guess_step.py).

Reading the weights takes most of a step's time, so a few rows cost little more than one. How many guesses are checked
depends on how often such guesses have been right and on how long steps of that many rows have taken; often there are
none.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from runtime.engine.answer import Answer
from runtime.engine.drafts import Drafts
from runtime.engine.graph import runs_compiled, runs_triton
from runtime.engine.guess_chunk import GuessChunk
from runtime.engine.guess_step import GuessStep
from runtime.engine.guesses import Checked
from runtime.engine.short_chunk import MOST_PICKED
from runtime.engine.step_cost import StepCost
from runtime.families.state import DecodeState
from runtime.kernels.attention_splits import GROUP_ROWS
from runtime.model.model import Model

LEAST_GAIN = 1.02  # expected speedup that guesses must exceed to be checked: the host's part takes time too


def can_speculate(model: Model) -> bool:
    """Whether a model checks guesses. Otherwise it decodes plainly, to the same tokens: on a CPU in plain PyTorch, and
    see `refusal`."""
    return runs_compiled(model) or (runs_triton(model) and refusal(model) is None)


def refusal(model: Model) -> str | None:
    """Why Triton's kernels of a model check no guesses; None where they do."""
    if model.runtime.max_batch == 1:
        return (
            "guesses are rows of one step, and a model of one row has faster kernels of its own, whose last bits are "
            "not those of rows of a step: expected a model loaded with max_batch of at least 2, better 8, got 1"
        )
    most = max(layer.heads // layer.kv_heads for layer in model.config.layers)
    if most > GROUP_ROWS:
        return f"expected a model of at most {GROUP_ROWS} query heads for a key head, got {most}"
    return None


class Speculation:
    """Takes the steps of an answer that has the model to itself.

    Args:
        model: the model.
        state: of all rows; the answer's is the first. One with logits for answers that choose their tokens from them.
    """

    def __init__(self, model: Model, state: DecodeState) -> None:
        self._state = state
        # Each position of a step needs a slot of its own, in every ring.
        rows = min(MOST_PICKED, *(buffer.shape[2] for buffer in state.cache.keys))
        self._step: GuessChunk | GuessStep
        if runs_compiled(model):
            self._step = GuessChunk(state)
        else:
            rows = min(rows, state.batch)
            self._step = GuessStep(model, state, rows)
            if state.logits is None:
                self._step.capture(model)
        self._most = rows - 1
        self._cost = StepCost()
        self._drafts = Drafts()
        self._prompt_tokens = 0
        self._new_ids: list[int] | None = None  # of the answer that the drafts are for

    def step(self, model: Model, answer: Answer, plain_step: Callable[[], None]) -> Checked:
        """Takes the answer's next step, which gives it one token or more, and waits for them. All earlier tokens have
        been handed out to it.

        Args:
            model: the model.
            answer: whose next tokens are wanted: at least one more.
            plain_step: takes a plain step of the answer's row.

        Returns:
            As `checked`: no more tokens than the answer may have.
        """
        guesses = self.guesses(answer, answer.max_new_tokens - len(answer.token_ids) - 1)
        started = time.perf_counter()
        if guesses:
            found = self.check(model, answer, guesses)
        else:
            plain_step()
            found = Checked(self._state.first_token())
        self._cost.timed(1 + len(guesses), time.perf_counter() - started)
        return found

    def guesses(self, answer: Answer, most: int) -> list[int]:
        """The guesses that are worth checking, at most `most`."""
        drafts = self._drafts_of(answer)
        match, most = drafts.match(), min(most, self._most)
        if not match.length or not self._cost.is_known:
            return []
        count, gain = 0, LEAST_GAIN
        chance = tokens = 1.0  # that all guesses so far are right; expected tokens of the step
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

    def check(self, model: Model, answer: Answer, guesses: list[int]) -> Checked:
        """The answer's next tokens, by a step that checks guesses; its row is left as plain steps would leave it."""
        return self._step.check(model, answer, guesses)

"""The prompts' part of a step: from the queue into a row, chunk by chunk, up to the first token."""

from __future__ import annotations

import math
from collections.abc import Callable

from runtime.engine.answer import Answer, Call
from runtime.engine.choosing import choose_first
from runtime.engine.pending import Launched, PendingTokens
from runtime.engine.prefill import Prefill, prefill_budget
from runtime.engine.prefix_cache import PrefixCache
from runtime.engine.prompt_logprobs import ScoredPrefill
from runtime.engine.queue import Queue
from runtime.engine.rows import Rows
from runtime.model.model import Model


class PrefillWork:
    """Gives the next free row to the first waiting answer, and runs its prompt there.

    Args:
        model: the model.
        queue: the answers that wait for a row.
        rows: those of the batch.
        pending: where first tokens are requested.
        is_ahead: whether the device is kept ahead of the host.
    """

    def __init__(self, model: Model, queue: Queue, rows: Rows, pending: PendingTokens, is_ahead: bool) -> None:
        self._queue, self._rows, self._pending, self._is_ahead = queue, rows, pending, is_ahead
        self._prefix_cache = PrefixCache(model)

    def run(self, model: Model, call: Call | None, may_end: Callable[[], bool]) -> None:
        """Runs prompts: a budget's worth where others decode, else as many as there are rows for.

        Args:
            model: the model.
            call: the caller's own; an error in one of its prompts is raised, any other ends the answer that it
                concerns.
            may_end: whether some call may be about to end; then this returns after each part of a prompt.
        """
        rows = self._rows
        if rows.filling is None and not self._queue:
            return
        others_decode = any(answer.steps for answer in rows.running)
        budget = prefill_budget(model)
        left: float = budget
        while True:
            answer = self._next() if rows.filling is None else rows.filling[0]
            if answer is None:
                return
            try:
                prefill = self._give_row(model, answer) if rows.filling is None else rows.filling[1]
                if others_decode and left < min(budget, prefill.next_work):
                    return
                # Whole chunks on a GPU, where a step of more rows than answers may run over the prompt's row.
                left -= prefill.advance(math.inf if self._is_ahead else left if others_decode else budget)
            except Exception as error:
                if call is answer.call:
                    raise
                answer.fail(error)
                rows.filling = None
                continue
            if prefill.is_done:
                rows.running.append(answer)
                rows.filling = None
                self._begin(model, answer, prefill)
            if not others_decode and may_end():
                return

    def _next(self) -> Answer | None:
        """The first waiting answer, if a row is free; None otherwise."""
        queue, rows = self._queue, self._rows
        while queue and (queue[0].is_over or queue[0] in rows.running):
            queue.pop()
        return queue[0] if queue and len(rows.running) < rows.state.batch else None

    def _give_row(self, model: Model, answer: Answer) -> Prefill:
        """Begins the first waiting answer's prompt in the row after the last running one."""
        queue, rows, sampling = self._queue, self._rows, answer.sampling
        row, state = len(rows.running), rows.state
        if answer.call.clock:
            answer.call.clock.start()
        rows.set(row, answer)
        top, samples = sampling.prompt_logprobs, sampling.samples
        is_wanted_again = len(queue) > 1 and _share_prompt(answer, queue[1])
        if answer.choice or top is not None or is_wanted_again:
            state = rows.with_logits
        cache = self._prefix_cache if answer.call.reuses else None
        if top is None:
            prefill = Prefill(model, state, row, answer.prompt, cache=cache, samples=samples)
        else:
            prefill = ScoredPrefill(model, state, row, answer.prompt, top, samples=samples)
        answer.cached_tokens = prefill.cached_tokens
        rows.filling = answer, prefill
        queue.pop()
        return prefill

    def _begin(self, model: Model, answer: Answer, prefill: Prefill) -> None:
        """Requests the first token of an answer whose prompt has been run, and begins waiting answers to the same
        prompt in copies of its row."""
        rows, row = self._rows, prefill.row
        if answer.choice:
            choose_first(model, rows.with_logits, row, answer, row)
        if isinstance(prefill, ScoredPrefill):
            answer.prompt_logprobs = tuple(prefill.logprobs)
        self._request_first(model, row, answer)
        if not prefill.leaves_logits:  # and no answer to the same prompt was waiting when it began
            return
        while (other := self._next()) and _share_prompt(answer, other):
            target = len(rows.running)
            rows.running.append(other)
            rows.state.copy_row(row, target, len(answer.prompt))
            rows.set(target, other)
            choose_first(model, rows.with_logits, target, other, row)
            other.cached_tokens, other.prompt_logprobs = len(answer.prompt), answer.prompt_logprobs
            self._request_first(model, target, other)

    def _request_first(self, model: Model, row: int, answer: Answer) -> None:
        if not answer.max_new_tokens:
            answer.finish("length")
        state = self._rows.state
        # A copy, since the next step overwrites it.
        self._pending.request(model, state, [state.token[row : row + 1].clone()], Launched((answer,), None))


def _share_prompt(answer: Answer, other: Answer) -> bool:
    """Whether one run of a prompt serves two answers: they are of one request, or both may reuse what others leave."""
    if answer.prompt is other.prompt:
        return True
    return (
        (answer.call.reuses and other.call.reuses)
        and answer.prompt == other.prompt
        and answer.sampling.prompt_logprobs == other.sampling.prompt_logprobs
    )

"""The batch that a model runs, and what one step of it does."""

from __future__ import annotations

from collections.abc import Callable

from runtime.engine.answer import Call
from runtime.engine.decode import DeviceSteps
from runtime.engine.pending import PendingTokens
from runtime.engine.prefill_work import PrefillWork
from runtime.engine.queue import Queue
from runtime.engine.rows import Rows
from runtime.engine.steps import Steps
from runtime.model.model import Model


class Batch:
    """The rows of a model, the prefill that fills them, the decode steps that advance them, and the tokens on their way
    to the host. It holds the decode state, but no reference to the model, which holds the batch.

    Args:
        model: the model.
        device: what takes the steps.
        queue: the answers that wait for a row.
    """

    def __init__(self, model: Model, device: DeviceSteps, queue: Queue) -> None:
        self._ahead = device.ahead(model)
        self._queue = queue
        self.rows = Rows(model)
        self._pending = PendingTokens(device, self._ahead)
        self._prefill_work = PrefillWork(model, queue, self.rows, self._pending, self._ahead > 0)
        self.steps = Steps(device, self.rows, self._pending, self._ahead)
        self._is_chunks_turn = True  # while others decode, chunks of prompts alternate with steps

    def make_ready(self, model: Model) -> None:
        """While no answer has a row, takes a step of each kind that the waiting answers need and that has not been
        taken yet, so that no token waits for its kernels to be compiled."""
        if not self.rows.answers and not model.runtime.eager:
            self.steps.warm_up(model, tuple(self._queue))

    def step(self, model: Model, call: Call | None, may_end: Callable[[], bool]) -> None:
        """Gives out free rows and runs prompts, launches decode steps, and hands out the oldest pending tokens.
        Arguments as in `PrefillWork.run`."""
        if self._is_chunks_turn or not self.rows.running:
            self._prefill_work.run(model, call, may_end)
        self._is_chunks_turn = True
        if self._pending and not self._ahead:  # a CPU is never ahead: first tokens go out before the next step
            self._is_chunks_turn = False
            is_due = True
        else:
            is_due = self.steps.launch(model)
        if self._pending and is_due:
            self._pending.hand_out_oldest()
            self.rows.take_back()

    def forget(self) -> None:
        """Frees every row, and drops the pending tokens."""
        self.rows.forget()
        self._pending.forget()
        self._is_chunks_turn = True

"""The rows of the decode state: which answer has which.

Rows are handed out from the first on, so that a step of `n` answers takes the first `n` rows; when an answer ends, the
last one takes its row. A prompt is run, between the steps of the others, in the row after the last one. An answer does
not depend on which row it has, on the other rows, or on when their answers came.
"""

from __future__ import annotations

import functools

from runtime.engine import decode
from runtime.engine.answer import Answer
from runtime.engine.prefill import Prefill
from runtime.families.state import DecodeState, new_state
from runtime.model.model import Model


class Rows:
    """The max_batch rows of a model's decode state, on which its graphs are captured.

    Not thread-safe, except that any thread may read which answers there are.
    """

    def __init__(self, model: Model) -> None:
        self.state = new_state(model, model.runtime.max_batch)
        self.running: list[Answer] = []  # by row
        self.filling: tuple[Answer, Prefill] | None = None  # in the row after the last that runs
        self.steps = 0  # decode steps launched on the state
        self._vocab = model.config.vocab
        self._views: dict[tuple[int, bool], DecodeState] = {}  # each made once, with what it caches
        self.forget()

    @property
    def answers(self) -> list[Answer]:
        """All answers that have a row. One may occur twice, if a change was interrupted as it began to run or moved."""
        filling = self.filling
        return [*self.running, *([] if filling is None else [filling[0]])]

    @property
    def samples(self) -> bool:
        """Whether any running answer draws its tokens."""
        return any(answer.sampling.samples for answer in self.running)

    @functools.cached_property
    def with_logits(self) -> DecodeState:
        """A view of all rows whose steps and prompts also leave their logits, in a buffer that is allocated on first
        use."""
        return self.state.with_logits(self._vocab)

    def first(self, rows: int, with_logits: bool = False) -> DecodeState:
        """A view of the first rows."""
        key = rows, with_logits
        if key not in self._views:
            self._views[key] = (self.with_logits if with_logits else self.state).first_rows(rows)
        return self._views[key]

    def of_step(self, model: Model, with_logits: bool = False) -> DecodeState:
        """A view of the next step's rows."""
        return self.first(decode.rows_of_step(model, len(self.running)), with_logits)

    def set(self, row: int, answer: Answer) -> None:
        """Sets up a row for its answer, which begins from its prompt."""
        answer.rewind()  # it may have had a row before, in a step that was interrupted
        # The first token comes from prefill, so that one step fewer is left.
        limit = len(answer.prompt) + max(answer.max_new_tokens - 1, 0)
        sampling = answer.sampling
        self.state.set_row(row, tuple(answer.stop_ids), limit, sampling.seed or 0, sampling.inverse_temperature)

    def take_back(self) -> None:
        """Frees the rows of answers that are over: the last running answer moves into each."""
        if self.filling and self.filling[0].is_over:
            self.filling = None
        for row in reversed(range(len(self.running))):
            if not self.running[row].is_over:
                continue
            last = self.running[-1]
            if last is self.running[row]:
                self.state.done[row] = True
            else:
                self.state.move_row(len(self.running) - 1, row, len(last.prompt) + last.steps)
                self.running[row] = last
            self.running.pop()
            if self.filling:
                prefill = self.filling[1]
                self.state.move_row(prefill.row, len(self.running), prefill.tokens)
                prefill.row = len(self.running)

    def forget(self) -> None:
        """Frees every row, on the host and on the device."""
        self.running.clear()
        self.filling = None
        self.steps = 0
        self.state.reset()
        self.state.done.fill_(True)

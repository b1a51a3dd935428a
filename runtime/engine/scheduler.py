"""The requests of a model: who waits, who drives, and how they end.

Whoever waits for an answer takes the steps, for everybody's rows, while nobody else does (turn.py): a lone caller
decodes in its own thread, and a reader who does not read holds up no one. What a step does is in batch.py.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from runtime.engine.answer import Answer, Call
from runtime.engine.batch import Batch
from runtime.engine.decode import DeviceSteps
from runtime.engine.queue import Queue
from runtime.engine.turn import Turn
from runtime.errors import ModelClosed, QueueFull
from runtime.families.state import DecodeState
from runtime.model.model import Model


class Scheduler:
    """Queues answers for a model's rows, and has its batch advance them, a step at a time.

    `step` is for whoever has the turn; any thread may call the other public methods.
    """

    def __init__(self, model: Model, steps: DeviceSteps | None = None) -> None:
        self.turn = Turn()
        self.is_closed = False
        self.has_endings = False  # some call has been asked to end
        self._is_watching = False  # some call has a timeout or an event
        self._is_changing = False  # whoever has the turn is changing the batch; stays True if interrupted
        self._device = steps or DeviceSteps()
        self._model = weakref.ref(model)  # weak: a cycle would leave both to the garbage collector
        self._queue = Queue()
        self._batch: Batch | None = None  # made with the first step
        self._process = os.getpid()  # whose answers the batch has

    # What any thread may call

    def submit(self, answers: Sequence[Answer], most_waiting: int | None = None) -> None:
        """Queues answers for a row.

        Raises:
            QueueFull: `most_waiting` answers wait already.
        """
        if most_waiting is not None and self.waiting >= most_waiting:
            self.turn.run(functools.partial(self._change, self._end))  # ended answers wait until somebody looks
            if (waiting := self.waiting) >= most_waiting:
                raise QueueFull(f"the queue is full: {waiting} prompts wait for a row, and max_queue = {most_waiting}")
        self._queue.add(answers)
        if any(answer.call.is_watched for answer in answers):
            self._is_watching = True  # assigned and not or-ed, since other threads assign it meanwhile

    @property
    def state(self) -> DecodeState | None:
        """The decode state, of max_batch rows; None before the first step."""
        return self._batch.rows.state if self._batch else None

    @property
    def waiting(self) -> int:
        """How many answers wait for a row."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many answers have a row."""
        batch = self._batch
        return len(batch.rows.answers) if batch else 0

    @property
    def tokens(self) -> int:
        """Tokens in the rows' caches."""
        batch = self._batch
        return sum(len(answer.prompt) + answer.steps for answer in tuple(batch.rows.running)) if batch else 0

    def drive(self, call: Call, is_served: Callable[[], bool]) -> None:
        """Waits until a reader is served, taking steps for everybody while nobody else does.

        Raises:
            ModelClosed: the model has been closed.
            Exception: a step has failed.
        """
        step = functools.partial(self.step, call)
        try:
            while not is_served() and self.turn.run(step):
                pass
            if is_served():  # without having waited for anybody
                return
            with self.turn.waits(call.ready) as ready:
                while not is_served():
                    if not self.turn.run(step):
                        self.turn.wait(ready)
        finally:
            self.tidy()

    def tidy(self) -> None:
        """Frees the rows of calls that have ended, and a closed model's memory, unless somebody is running the model
        and will do it."""
        while self.has_endings or self.is_closed:
            if not self.turn.run(functools.partial(self._change, self._collect)):
                return
            if self.is_closed:
                self.turn.run(self._free_model)
                break
        self.turn.wake_next()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until nobody runs the model, and keeps it so inside the `with` block.

        Raises:
            ModelClosed: the model has been closed.
        """
        try:
            with self.turn.held():
                self._open_model()
                self._make_good()
                yield
        finally:
            self.tidy()

    @contextmanager
    def free_row(self) -> Iterator[tuple[DecodeState, int]]:
        """The same, with a free row: yields the state and the row's index. What is left in the row is discarded."""
        with self.alone():
            rows = self._made_batch(self._open_model()).rows
            while len(rows.answers) == rows.state.batch:
                self.step()
            self._is_changing = True
            yield rows.state, rows.state.batch - 1
            self._is_changing = False

    # What the holder of the turn does

    def step(self, call: Call | None = None) -> None:
        """Takes the next step: ends what is to end, then advances the batch.

        Whatever interrupts it, nothing is lost: answers start over from their prompts, get the same tokens, and hand
        out only what has not been handed out.

        Args:
            call: the caller's own; an error in one of its prompts is raised, any other ends the answer that it
                concerns.
        """
        self._change(functools.partial(self._step, call))

    def _step(self, call: Call | None) -> None:
        model = self._open_model()
        batch = self._made_batch(model)
        batch.make_ready(model)
        self._end()
        batch.step(model, call, self._may_end)

    def _change(self, action: Callable[[], None]) -> None:
        """Runs an action that changes the batch. If it is interrupted, whoever has the turn next repairs the batch."""
        self._make_good()
        self._is_changing = True
        action()
        self._is_changing = False

    def _make_good(self) -> None:
        """Repairs the batch after an interrupted change, or an interrupted repair. Answers that had a row go back to
        the front of the queue."""
        if self._process != os.getpid():  # in a forked child there are no readers but those that ask again
            if self._batch:
                self._batch.forget()
            self._process = os.getpid()
        if self._is_changing:
            if self._batch:
                self._queue.put_back(self._batch.rows.answers)
                self._batch.forget()
            self.has_endings = True  # the end of some call may have been interrupted
            self._is_changing = False

    def _open_model(self) -> Model:
        model = self._model()
        assert model is not None, "a request holds its model"
        if self.is_closed:
            raise ModelClosed(f"{model.name} has been closed: load it again")
        return model

    def _made_batch(self, model: Model) -> Batch:
        """The batch, made once."""
        if self._batch is None:
            self._batch = Batch(model, self._device, self._queue)
        return self._batch

    # How calls end

    def _may_end(self) -> bool:
        """Whether some call may be about to end."""
        return self.has_endings or self._is_watching

    def _end(self) -> None:
        """Ends what is to end, if anything is."""
        if self._is_watching:
            self._look()
        if self.has_endings:
            self._collect()

    def _answers(self) -> list[Answer]:
        """All answers that have a row or wait for one."""
        return [*(self._batch.rows.answers if self._batch else ()), *self._queue]

    def _look(self) -> None:
        """Checks the calls that something outside may end."""
        self._is_watching = False  # first, for other threads set it meanwhile
        for answer in self._answers():
            if answer.call.is_watched:
                self._is_watching = True
                answer.call.look()
                if answer.call.is_ended:
                    self.has_endings = True

    def _collect(self) -> None:
        """Ends the answers of calls that have been asked to end, and frees their rows."""
        self.has_endings = False
        for answer in self._answers():
            if answer.call.is_ended and not answer.is_over:
                answer.finish(answer.call.reason)
        self._queue.remove_finished()
        if self._batch:
            self._batch.rows.take_back()

    def clear(self) -> None:
        """Ends every call, and drops the state and its graphs. Calls that come meanwhile wait for new ones."""
        with self.alone():
            for answer in self._answers():
                answer.call.end("cancelled")
            self._change(self._collect)
            self._batch = None

    def _free_model(self) -> None:
        """Drops the state, its graphs and the weights. Whoever waits finds the model closed."""
        self._batch = None
        self._queue.clear()
        self.turn.wake_all()
        if model := self._model():
            vars(model).pop("weights", None)
            vars(model).pop("rope", None)


def scheduler_of(model: Model) -> Scheduler:
    """A model's scheduler, created on first use."""
    scheduler: Scheduler | None = model.engine
    if scheduler is None:
        # setdefault is atomic, so that threads whose first requests coincide share one scheduler; a lock could stay
        # held after Ctrl-C.
        scheduler = vars(model).setdefault("_engine", Scheduler(model))
    return scheduler


def is_closed(model: Model) -> bool:
    return model.engine is not None and model.engine.is_closed


def check_open(model: Model) -> None:
    """Refuse a closed model.

    Raises:
        ModelClosed: it is one.
    """
    if is_closed(model):
        raise ModelClosed(f"{model.name} has been closed: load it again")


def close(model: Model) -> None:
    """Free a model's memory, now or after the step under way, which reads the weights. Whoever waits for the model or
    reads a stream of it finds it closed."""
    scheduler = scheduler_of(model)
    scheduler.is_closed = True
    scheduler.tidy()

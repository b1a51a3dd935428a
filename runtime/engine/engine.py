"""A model's engine: the lock that its requests wait for, and the decode state that they share."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from runtime.engine.decode import rows_of_step, stepper
from runtime.engine.lock import RequestLock
from runtime.errors import ModelClosed
from runtime.families.state import DecodeState, new_state
from runtime.model.model import Model

_log = logging.getLogger("gemma_runtime")


class Engine:
    """The lock that a model's requests wait for, and the decode state that they share."""

    def __init__(self, model: Model) -> None:
        self.lock = RequestLock()
        self.state: DecodeState | None = None  # of max_batch rows, with the graphs captured on it
        self.is_closed = False
        self._model = weakref.ref(model)  # weak: a cycle would leave both to the garbage collector
        self._views: dict[int, DecodeState] = {}  # the state's first rows, by their number
        self._is_warm = False

    def ready_state(self, rows: int, stop_ids: Sequence[int] = (), *, decodes: bool = True) -> DecodeState:
        """The decode state, allocated once, reset for new prompts. For the request that holds the engine.

        Args:
            rows: prompts; the state has at least as many rows, and those without a prompt are done from the start.
            stop_ids: token ids after which a row is done.
            decodes: whether decode steps follow: before the first ones, a step without prompts compiles the kernels, so
                that no token waits for that.
        """
        model = self._model()
        assert model is not None, "a request holds its model"
        full_state = new_state(model, model.runtime.max_batch) if self.state is None else self.state
        row_count = rows_of_step(model, rows)
        state = self._views.get(row_count) or full_state.first_rows(row_count)
        if decodes and not self._is_warm and not model.runtime.eager:
            _log.info("%s: compiling and capturing the decode step, or loading it from the cache", model.name)
            started = time.perf_counter()
            stepper(model, state)()
            self._is_warm = True
            _log.info("%s: decode step ready after %.1f s", model.name, time.perf_counter() - started)
        self.state, self._views[row_count] = full_state, state
        state.reset(stop_ids, rows=rows)
        return state

    def free(self) -> None:
        """Drops the state and its graphs."""
        self.state = None
        self._views.clear()
        self._is_warm = False


def engine_of(model: Model) -> Engine:
    """A model's engine, created on first use."""
    engine: Engine | None = model.engine
    if engine is None:
        # Atomic, so that threads whose first requests meet share one; a lock could stay held after Ctrl-C.
        engine = vars(model).setdefault("_engine", Engine(model))
    return engine


@contextmanager
def request_on(model: Model) -> Iterator[Engine]:
    """Wait for a model, and hold its engine inside the `with` block.

    Raises:
        ModelBusy: this very thread holds it, by an unfinished stream.
        ModelClosed: the model has been closed, before or meanwhile.
    """
    engine = engine_of(model)
    try:
        with engine.lock.held():
            check_open(model)
            yield engine
    finally:
        if engine.is_closed:
            close(model)


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
    """Free a model's memory, now or when the request that holds it has ended: a step under way reads the weights.
    Whoever waits for the model finds it closed."""
    engine = engine_of(model)
    engine.is_closed = True
    if not engine.lock.is_held:
        engine.free()
        vars(model).pop("weights", None)
        vars(model).pop("rope", None)

"""What runs requests on one model, made by the first of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.engine.turn import Turn
from runtime.errors import ModelClosed
from runtime.families.state import DecodeState
from runtime.model.model import Model

_making = threading.Lock()


class Engine:
    """The lock that requests wait for, the decode state that they share, and the memory of its CUDA graphs."""

    def __init__(self) -> None:
        self.turn = Turn()
        self.state: DecodeState | None = None
        self.graph_pool: Any = None
        self.closed = False


def engine_of(model: Model) -> Engine:
    """A model's engine, made when it is first asked for."""
    with _making:
        if model.engine is None:
            model.engine = Engine()
        engine: Engine = model.engine
        return engine


@contextmanager
def request_on(model: Model) -> Iterator[Engine]:
    """Wait for a model and have it to oneself inside the `with` block.

    Raises:
        ModelBusy: this very thread has it, by a stream that it has not finished.
        ModelClosed: it was closed, before or meanwhile.
    """
    engine = engine_of(model)
    try:
        with engine.turn.taken():
            check_open(model)
            yield engine
    finally:
        if engine.closed:
            close(model)


def is_closed(model: Model) -> bool:
    return model.engine is not None and model.engine.closed


def check_open(model: Model) -> None:
    """Refuse a closed model.

    Raises:
        ModelClosed: it is one.
    """
    if is_closed(model):
        raise ModelClosed(f"{model.name} has been closed: load it again")


def close(model: Model) -> None:
    """End what runs on a model and free its memory, now or when the request that has the model has ended: a step that
    is under way reads the weights. Whoever waits for the model finds it closed.
    """
    engine = engine_of(model)
    engine.closed = True
    if not engine.turn.is_taken:
        engine.state = engine.graph_pool = None
        vars(model).pop("weights", None)
        vars(model).pop("rope", None)

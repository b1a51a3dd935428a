"""What runs requests on one model, made by the first of them."""

from __future__ import annotations

import threading
from typing import Any

from runtime.engine.turn import Turn
from runtime.families.state import DecodeState
from runtime.model.model import Model

_making = threading.Lock()


class Engine:
    """The lock that requests wait for, the decode state that they share, and the memory of its CUDA graphs."""

    def __init__(self) -> None:
        self.turn = Turn()
        self.state: DecodeState | None = None
        self.graph_pool: Any = None


def engine_of(model: Model) -> Engine:
    """A model's engine, made when it is first asked for."""
    with _making:
        if model.engine is None:
            model.engine = Engine()
        engine: Engine = model.engine
        return engine

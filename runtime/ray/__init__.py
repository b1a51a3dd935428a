"""More machines than one: `build_processor` for Ray Data, `deployment` for Ray Serve.

Both put an engine into each of Ray's actors and leave the rest to Ray: where actors run, how many there are, and what
is rerun when one is lost. A rerun gives the same tokens, since an answer depends on its prompt, its options and its
seed, and on nothing that runs beside it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from runtime.errors import MissingPackage

if TYPE_CHECKING:
    from runtime.ray.processor import Processor, build_processor
    from runtime.ray.replica import deployment

__all__ = ["Processor", "build_processor", "deployment"]

_HOME = {
    "Processor": "runtime.ray.processor",
    "build_processor": "runtime.ray.processor",
    "deployment": "runtime.ray.replica",
}

if not TYPE_CHECKING:  # for a type checker it would make every name exist

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:  # an actor of one of the two need not import the other's libraries
            return getattr(importlib.import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("runtime"):
                raise
            raise MissingPackage(
                f"runtime.ray.{name} needs {error.name}: pip install 'gemma-runtime[ray]'", name=error.name
            ) from error

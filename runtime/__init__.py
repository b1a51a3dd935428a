"""Greedy decoding of Gemma 1, 2 and 3, token for token what Hugging Face generates.

    import runtime

    model = runtime.load("google/gemma-3-1b-it")
    result = runtime.generate(model, "A dog running through the snow is", max_new_tokens=64)
    print(result.text, result.stats)

Importing this package imports nothing but its errors: torch comes with the first name that is used.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from runtime.errors import (
    AccessDenied,
    CacheError,
    CheckpointError,
    GemmaRuntimeError,
    HubError,
    InvalidArgument,
    InvalidArgumentType,
    MissingPackage,
    ModelBusy,
    ModelNotFound,
    NonFiniteError,
    NotEnoughMemory,
    OutputError,
)

if TYPE_CHECKING:
    from runtime.engine.result import GenerationResult, Piece, Stats
    from runtime.generation import chat, generate, stream
    from runtime.inspection.inspection import inspect
    from runtime.loading import load
    from runtime.model.model import Model
    from runtime.parity.verify import verify

__version__ = "0.1.0"
__all__ = [
    "AccessDenied",
    "CacheError",
    "CheckpointError",
    "GemmaRuntimeError",
    "GenerationResult",
    "HubError",
    "InvalidArgument",
    "InvalidArgumentType",
    "MissingPackage",
    "Model",
    "ModelBusy",
    "ModelNotFound",
    "NonFiniteError",
    "NotEnoughMemory",
    "OutputError",
    "Piece",
    "Stats",
    "chat",
    "generate",
    "inspect",
    "load",
    "stream",
    "verify",
]

_HOME = {
    "GenerationResult": "runtime.engine.result",
    "Model": "runtime.loading",
    "Piece": "runtime.engine.result",
    "Stats": "runtime.engine.result",
    "chat": "runtime.generation",
    "generate": "runtime.generation",
    "inspect": "runtime.inspection.inspection",
    "load": "runtime.loading",
    "stream": "runtime.generation",
    "verify": "runtime.parity.verify",
}


class _Package(types.ModuleType):
    """This package. Three functions share their name with the module they live in (`runtime.load`, `runtime.generate`,
    `runtime.verify`); Python binds a submodule to its package whenever it is first imported, and the function is what
    stays here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # to which any name would be there

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

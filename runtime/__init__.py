"""Greedy decoding of Gemma 1, 2 and 3, token for token what Hugging Face generates.

    import runtime

    model = runtime.load("google/gemma-3-1b-it")
    result = runtime.generate(model, "A dog running through the snow is", max_new_tokens=64)
    print(result.text, result.stats)

Importing this package imports nothing but its errors; torch is imported when another name is first used. It logs to
`logging.getLogger("gemma_runtime")`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from runtime.errors import (
    AccessDenied,
    CacheError,
    CheckpointError,
    GemmaRuntimeError,
    GrammarTooComplex,
    HubError,
    InvalidArgument,
    InvalidArgumentType,
    MissingPackage,
    ModelClosed,
    ModelNotFound,
    NonFiniteError,
    NotEnoughMemory,
    OutputError,
    QueueFull,
)

if TYPE_CHECKING:
    from runtime.api import Model, load, wrap
    from runtime.engine.async_stream import AsyncStream
    from runtime.engine.engine import Engine
    from runtime.engine.many import generate_many
    from runtime.engine.result import GenerationResult, Piece, Stats
    from runtime.engine.stream import Stream
    from runtime.generation import agenerate, astream, chat, generate, stream
    from runtime.inspection.inspection import inspect
    from runtime.inspection.result import Inspection
    from runtime.parity.report import Report
    from runtime.parity.verify import verify

__version__ = "0.1.0"
__all__ = [
    "AccessDenied",
    "AsyncStream",
    "CacheError",
    "CheckpointError",
    "Engine",
    "GemmaRuntimeError",
    "GenerationResult",
    "GrammarTooComplex",
    "HubError",
    "Inspection",
    "InvalidArgument",
    "InvalidArgumentType",
    "MissingPackage",
    "Model",
    "ModelClosed",
    "ModelNotFound",
    "NonFiniteError",
    "NotEnoughMemory",
    "OutputError",
    "Piece",
    "QueueFull",
    "Report",
    "Stats",
    "Stream",
    "agenerate",
    "astream",
    "chat",
    "generate",
    "generate_many",
    "inspect",
    "load",
    "stream",
    "verify",
    "wrap",
]

_HOME = {
    "AsyncStream": "runtime.engine.async_stream",
    "Engine": "runtime.engine.engine",
    "GenerationResult": "runtime.engine.result",
    "Inspection": "runtime.inspection.result",
    "Model": "runtime.api",
    "Piece": "runtime.engine.result",
    "Report": "runtime.parity.report",
    "Stats": "runtime.engine.result",
    "Stream": "runtime.engine.stream",
    "agenerate": "runtime.generation",
    "astream": "runtime.generation",
    "chat": "runtime.generation",
    "generate": "runtime.generation",
    "generate_many": "runtime.engine.many",
    "inspect": "runtime.inspection.inspection",
    "load": "runtime.api",
    "stream": "runtime.generation",
    "verify": "runtime.parity.verify",
    "wrap": "runtime.api",
}

if not TYPE_CHECKING:  # for a type checker it would make every name exist

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

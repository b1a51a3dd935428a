"""How an actor loads its model: the arguments of `runtime.load`, under the name that Ray's own modules use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from runtime import api
from runtime.errors import InvalidArgumentType

NAMES = tuple(name for name in inspect.signature(api.load).parameters if name not in ("source", "interface"))


def read_engine_kwargs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Checks the names early; an actor would complain about them much later.

    Raises:
        InvalidArgumentType: `runtime.load` has no such argument.
    """
    for name in given or {}:
        if name not in NAMES:
            raise InvalidArgumentType(f"engine_kwargs must be those of runtime.load ({', '.join(NAMES)}), got {name}")
    return dict(given or {})

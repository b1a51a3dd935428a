"""Python's garbage collector while a command starts: what is imported and loaded then is used to the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Collects nothing meanwhile, and from then on leaves alone all that there is: going through it several times takes
    0.3 s. Until `resume`, at the end, for some libraries warn of what is left when the interpreter ends."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def resume() -> None:
    """Collects everything again."""
    gc.unfreeze()

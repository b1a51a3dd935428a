"""One engine in its own process, asked through a connection.

    python serve.py ENGINE_FILE FILE_DESCRIPTOR

The file defines a class `Engine` with `version`, `load(options)` and `run(prompt, new_tokens, emit)`, which calls
`emit(token)` as soon as it has each token. A peer's file imports nothing but the peer's own packages and the standard
library, so that any interpreter can run it. Requests come, and answers go, through the connection of the descriptor:

    (started)                                          -> {"version": ...}
    {"export": {...}}                                  -> {}, of an engine with a file format of its own
    {"load": {...}}                                    -> {"load_s": ...}
    {"audit": {}}                                      -> what it found, of an engine that can be audited
    {"run": {"prompt": [...], "new_tokens": n}}        -> {"tokens": [...], "times_s": [...], "peak_memory_mb": ...}

or {"error": "...", "missing": whether a package is not installed}. The end of the connection ends the
process.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def reset_peak_memory() -> None:
    """Resets the process's peak memory to its current use; on Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float | None:
    """The process's peak memory since the reset, in 10^6 bytes; None where the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), None)


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """An engine's answer to one request."""
    if "export" in request:
        engine.export(**request["export"])
        return {}
    if "load" in request:
        started = time.perf_counter()
        engine.load(request["load"])
        load_s = time.perf_counter() - started
        getattr(engine, "reset_peak_memory", reset_peak_memory)()
        return {"load_s": load_s}
    if "audit" in request:
        return engine.audit()
    asked = request["run"]
    times: list[float] = []
    tokens: list[int] = []

    def emit(token: int) -> None:
        times.append(time.perf_counter() - started)
        tokens.append(token)

    started = time.perf_counter()
    engine.run(asked["prompt"], asked["new_tokens"], emit)
    peak_mb = getattr(engine, "peak_memory_mb", peak_memory_mb)()
    return {"tokens": tokens, "times_s": times, "peak_memory_mb": peak_mb}


def main(file: str, descriptor: int) -> None:
    # An engine's file is named after its package, which would hide it.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path and str(Path(path).resolve()) != here]
    os.set_inheritable(descriptor, False)  # what an engine starts does not keep the connection open
    connection = Connection(descriptor)
    try:
        engine = runpy.run_path(file)["Engine"]()
    except Exception as error:
        return connection.send(complaint(error))
    connection.send({"version": engine.version})
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            try:
                connection.send(answer(engine, request))
            except Exception as error:
                connection.send(complaint(error))


def complaint(error: Exception) -> dict[str, Any]:
    """The answer where there is none."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return {"error": text[:500], "missing": isinstance(error, ImportError)}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""One engine in its own process, driven by JSON lines.

    python serve.py ENGINE_FILE

The file defines a class `Engine` with `version`, `load(options)` and `run(prompt, new_tokens, emit)`, which calls
`emit(token)` as soon as it has each token. A peer's file imports nothing but the peer's own packages and the standard
library, so that any interpreter can run it. One request per line on stdin, one answer per line on the stdout that the
process was started with:

    (started)                                          -> {"version": ...}
    {"export": {...}}                                  -> {}, of an engine with a file format of its own
    {"load": {...}}                                    -> {"load_s": ...}
    {"audit": {}}                                      -> what it found, of an engine that can be audited
    {"run": {"prompt": [...], "new_tokens": n}}        -> {"tokens": [...], "times_s": [...], "peak_memory_mb": ...}

or {"error": "...", "missing": whether a package is not installed}. The end of stdin ends the process.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def reset_peak_memory() -> None:
    """Resets the process's peak memory to its current use; on Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


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
        found = {"load_s": time.perf_counter() - started}
        reset = getattr(engine, "reset_peak_memory", reset_peak_memory)
        reset()
        return found
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
    peak = engine.peak_memory_mb() if hasattr(engine, "peak_memory_mb") else peak_memory_mb()
    return {"tokens": tokens, "times_s": times, "peak_memory_mb": peak}


def main(file: str) -> None:
    # An engine's file is named after its package, which would hide it.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path and str(Path(path).resolve()) != here]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries apart from the answers

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    def complain(error: Exception) -> None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        reply({"error": text[:500], "missing": isinstance(error, ImportError)})

    try:
        engine = runpy.run_path(file)["Engine"]()
    except Exception as error:
        return complain(error)
    reply({"version": engine.version})
    for line in sys.stdin:
        try:
            reply(answer(engine, json.loads(line)))
        except Exception as error:
            complain(error)


if __name__ == "__main__":
    main(sys.argv[1])

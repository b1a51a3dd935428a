"""Compiles the kernels that the cache on disk lacks, in several processes at once: numba's compiler holds the GIL, and
a model's first answer on a machine waits for half a minute of compilation."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from numba.core.serialize import dumps

from runtime.kernels.cpu.cache import KernelCache

MOST_PROCESSES = 4  # a step has few kernels, and each process takes some hundreds of MB
MOST_SECONDS = 120.0  # to wait for one of them; then what it had is compiled here
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from runtime.kernels.cpu.compiling import serve; serve()"
)

Wanted = tuple[Any, tuple[Any, ...]]  # a kernel and numba's types of its arguments


def compile_all(wanted: Iterable[Wanted]) -> None:
    """Compiles kernels, those that are not on disk in several processes. What another process fails to compile is left
    to whoever needs it."""
    left = deque((kernel, kinds) for kernel, kinds in wanted if _is_missing(kernel, kinds))
    with ExitStack() as stack:
        feeders = []
        for _ in range(min(len(left), _processors(), MOST_PROCESSES) - 1):
            with suppress(OSError):  # no memory for one, or not allowed
                child = stack.enter_context(_started())
                stack.callback(child.kill)
                feeders.append(threading.Thread(target=_feed, args=(child, left), daemon=True))
                feeders[-1].start()
        with suppress(IndexError):
            while True:
                kernel, kinds = left.popleft()
                kernel.compile(kinds)
        for feeder in feeders:
            feeder.join(MOST_SECONDS)


def serve() -> None:
    """Compiles what comes on standard input, and answers with a line for each."""
    with suppress(EOFError):
        while True:
            module, name, kinds = pickle.load(sys.stdin.buffer)
            getattr(importlib.import_module(module), name).compile(kinds)
            print(flush=True)


def _is_missing(kernel: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a kernel is neither in memory nor on disk, and will be there for other processes once it is compiled."""
    cache = kernel._cache
    return kinds not in kernel.overloads and isinstance(cache, KernelCache) and not cache.has(kinds, kernel.targetctx)


def _processors() -> int:
    """How many processors this process may use; 1 where it cannot start another Python."""
    if not Path(sys.executable or "").name.startswith("python"):  # embedded in another program
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _started() -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)


def _feed(child: subprocess.Popen[bytes], left: deque[Wanted]) -> None:
    """Gives a process one kernel after another, until none is left or it ends."""
    assert child.stdin is not None and child.stdout is not None, "both are pipes"
    with suppress(IndexError, OSError, ValueError):  # closed, as after Ctrl-C
        while True:
            kernel, kinds = left.popleft()
            function = kernel.py_func
            child.stdin.write(dumps((function.__module__, function.__qualname__, kinds)))
            if not child.stdout.readline():
                break

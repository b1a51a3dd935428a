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
Missing = tuple[Any, tuple[Any, ...], Path]  # and the file that it will be in


def compile_all(wanted: Iterable[Wanted]) -> None:
    """Compiles kernels, those that are not on disk in several processes. What another process fails to compile is left
    to whoever needs it."""
    left = deque((kernel, kinds, file) for kernel, kinds in wanted if (file := _missing_file(kernel, kinds)))
    with ExitStack() as stack:
        feeders = []
        with suppress(OSError, RuntimeError):  # no memory for more processes or threads, or not allowed
            for _ in range(min(len(left), _processors(), MOST_PROCESSES) - 1):
                child = stack.enter_context(_started())
                stack.callback(child.kill)
                feeder = threading.Thread(target=_feed, args=(child, left), daemon=True)
                feeder.start()
                feeders.append(feeder)
        with suppress(IndexError):
            while True:
                kernel, kinds, _ = left.popleft()
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


def _missing_file(kernel: Any, kinds: tuple[Any, ...]) -> Path | None:
    """The file that a kernel will be in once any process has compiled it; None if it is in memory or on disk already,
    or is not saved."""
    cache = kernel._cache
    if kinds in kernel.overloads or not isinstance(cache, KernelCache):
        return None
    file = cache.file(kinds, kernel.targetctx)
    return None if os.path.exists(file) else file


def _processors() -> int:
    """How many processors this process may use; 1 where it cannot start another Python."""
    if not Path(sys.executable or "").name.startswith("python"):  # embedded in another program
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _started() -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    options = ["-B"] if sys.dont_write_bytecode else []  # -I ignores the variables for these
    options += ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
    path = [entry for entry in sys.path if isinstance(entry, str)]  # Python ignores others
    command = [sys.executable, "-I", *options, "-c", _CHILD, json.dumps(path)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)


def _feed(child: subprocess.Popen[bytes], left: deque[Missing]) -> None:
    """Gives a process one kernel after another, until none is left, it ends or it does not save one."""
    assert child.stdin is not None and child.stdout is not None, "both are pipes"
    with suppress(IndexError, OSError, ValueError):  # closed, as after Ctrl-C
        while True:
            kernel, kinds, file = left.popleft()
            function = kernel.py_func
            child.stdin.write(dumps((function.__module__, function.__qualname__, kinds)))
            if not child.stdout.readline() or not os.path.exists(file):
                break

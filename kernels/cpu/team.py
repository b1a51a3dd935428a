"""A team of threads, and a decode step's calls compiled into one function that all of them run (sharing.py says how).

Between the calls of a step no thread returns to Python or waits for the system. The threads are Python's and sleep when
no step has come for a while.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import typeof

from runtime.kernels.cpu import sharing

_idle: dict[tuple[int, int], list[Team]] = {}  # by process and number of threads
_started: weakref.WeakSet[Team] = weakref.WeakSet()


class Program:
    """Captured calls as machine code. It holds the arrays, whose addresses are in the code."""

    def __init__(self, calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
        self._calls = tuple(calls)
        self._engine = _compiled(self._calls)
        self._code = self._engine.get_function_address("step")
        self._teams: set[Team] = set()

    def run(self, threads: int) -> None:
        """Runs the calls in order on this many threads, the caller's among them. Raises MemoryError if a call cannot
        allocate its buffers; what the calls write is then undefined."""
        idle = _idle.setdefault((os.getpid(), threads), [])
        try:
            team = idle.pop()
        except IndexError:
            team = Team(threads)
        self._teams.add(team)
        try:
            failed = team.run(self._code)
        except BaseException:  # Ctrl-C, raised once the step has ended
            idle.append(team)
            raise
        if failed:
            team.stop()
            raise MemoryError("no memory for the buffers of a decode step")
        idle.append(team)

    def __del__(self) -> None:
        for team in getattr(self, "_teams", ()):  # a late thread may still be reading the arrays
            team.drain()


class Team:
    """A number of threads: the caller of `run` leads, and the team's own threads follow."""

    def __init__(self, threads: int) -> None:
        self._words = np.zeros(sharing.TEAM_WORDS, np.int64)
        self._words[sharing.THREADS] = threads
        for thread in range(threads):
            self._words[sharing.thread_word(thread, sharing.PHASE)] = 1
        self._process = os.getpid()
        self._steps, self._asleep, self._stopped = 0, 0, False
        self._lock = threading.RLock()  # reentrant: the garbage collector may call `drain` during `run`
        self._wake = threading.Condition(threading.Lock())
        self._threads: list[threading.Thread] = []
        with suppress(RuntimeError):  # the system refuses more threads: those that started do all the work
            for thread in range(1, threads):
                started = threading.Thread(None, self._follow, f"gemma-runtime {thread}", (thread,), daemon=True)
                started.start()
                self._threads.append(started)
        _started.add(self)

    def run(self, code: int) -> int:
        """Runs a program's code; nonzero if a call failed, after which the team must not be used again."""
        with self._lock:
            with self._wake:
                self._steps += 1
                if self._asleep:
                    self._wake.notify_all()
            return sharing.lead(self._words, code)

    def drain(self) -> None:
        """Returns once no thread is in a step or can still enter one that has ended."""
        if self._stopped or self._process != os.getpid():  # a forked child has none of the threads
            return
        in_step = [sharing.thread_word(thread + 1, sharing.IN_STEP) for thread in range(len(self._threads))]
        with self._lock:
            sharing.lead(self._words, 0)
            while self._words[in_step].any():
                time.sleep(1e-4)

    def stop(self) -> None:
        """Ends the threads."""
        if self._stopped or self._process != os.getpid():
            return
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _follow(self, thread: int) -> None:
        last_sequence = 0
        while not self._stopped:
            steps = self._steps
            last_sequence = sharing.follow(self._words, thread, last_sequence)
            with self._wake:
                self._asleep += 1
                while not self._stopped and self._steps == steps:
                    self._wake.wait()
                self._asleep -= 1


@atexit.register
def _stop_all() -> None:
    """Before the interpreter frees what the threads run."""
    for team in list(_started):
        team.stop()


def _compiled(calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> Any:
    """An LLVM engine with `int32 step(int64 *team, int64 thread)`, which makes the calls in order until one fails."""
    words = np.zeros(sharing.TEAM_WORDS, np.int64)
    index, status = ir.IntType(64), ir.IntType(32)
    module = ir.Module("step")
    step = ir.Function(module, ir.FunctionType(status, [index.as_pointer(), index]), "step")
    builder = ir.IRBuilder(step.append_basic_block())
    result, error = (builder.alloca(ir.IntType(8).as_pointer()) for _ in range(2))  # unused: the calls return None
    for kernel, arguments in calls:
        address, kind = _machine_code(kernel, (words, 0, *arguments))
        flat: list[Any] = [result, error, *_flat(words, step.args[0]), step.args[1]]
        for argument in arguments:
            flat += _flat(argument)
        values = [_converted(builder, value, wanted) for value, wanted in zip(flat, kind.args, strict=True)]
        function = builder.inttoptr(ir.Constant(index, address), kind.as_pointer())
        failed = builder.icmp_signed("!=", builder.call(function, values), status(0))
        with builder.if_then(failed, likely=False):
            builder.store(index(1), builder.gep(step.args[0], [index(sharing.FAILED)]))
            builder.ret(status(1))
    builder.ret(status(0))
    machine = binding.Target.from_default_triple().create_target_machine(opt=0, jit=True)
    module.triple = binding.get_process_triple()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine


def _machine_code(kernel: Any, arguments: tuple[Any, ...]) -> tuple[int, Any]:
    """The address of a kernel's machine code for arguments of these types, and its LLVM type."""
    kinds = tuple(typeof(argument) for argument in arguments)
    kernel.compile(kinds)
    compiled = kernel.overloads[kinds]
    described = compiled.fndesc
    kind = kernel.targetctx.call_conv.get_function_type(described.restype, described.argtypes)
    return compiled.library.get_pointer_to_function(described.llvm_func_name), kind


def _flat(argument: Any, address: Any = None) -> list[Any]:
    """What numba passes for a number, or for an array: (two owners, size, itemsize, address, shape, strides)."""
    if not isinstance(argument, np.ndarray):
        return [0 if argument is None else argument]
    address = argument.ctypes.data if address is None else address
    return [0, 0, argument.size, argument.itemsize, address, *argument.shape, *argument.strides]


def _converted(builder: Any, value: Any, wanted: Any) -> Any:
    """A number as an LLVM constant, or an address as a pointer, of the wanted type."""
    if isinstance(value, ir.Value):
        return builder.bitcast(value, wanted) if isinstance(wanted, ir.PointerType) else value
    if isinstance(wanted, ir.PointerType):
        return builder.inttoptr(ir.Constant(ir.IntType(64), int(value)), wanted)
    return ir.Constant(wanted, float(value) if isinstance(wanted, ir.FloatType) else int(value))

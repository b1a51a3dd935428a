"""Threads that take the compiled calls of a step together, and those calls as one piece of machine code.

Between two calls no thread goes back to Python or waits for the system. The threads are Python's, asleep where no step
has come for a while; operations.py says how they share the work, and why one that is kept from its core keeps no other
from going on.
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
    """Captured calls as machine code. It keeps the memory that they read and write."""

    def __init__(self, calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
        self._calls = tuple(calls)  # arrays, whose addresses are in the code
        self._engine = _compiled(self._calls)
        self._code = self._engine.get_function_address("step")
        self._teams: set[Team] = set()

    def run(self, threads: int) -> None:
        """Runs the calls in order on so many threads, this one among them.

        Raises:
            MemoryError: a call found no memory for itself; what the calls write is then undefined.
        """
        idle = _idle.setdefault((os.getpid(), threads), [])
        try:
            team = idle.pop()
        except IndexError:
            team = Team(threads)
        self._teams.add(team)
        try:
            failed = team.run(self._code)
        except BaseException:  # Ctrl-C, heeded when the step is over
            idle.append(team)
            raise
        if failed:
            team.stop()
            raise MemoryError("no memory for the buffers of a decode step")
        idle.append(team)

    def __del__(self) -> None:
        for team in getattr(self, "_teams", ()):  # a late thread may still be reading
            team.leave()


class Team:
    """So many threads, the one that calls `run` and others of its own, which start with the first step."""

    def __init__(self, threads: int) -> None:
        self._words = np.zeros(sharing.TEAM_WORDS, np.int64)
        self._words[sharing.THREADS] = threads
        for thread in range(threads):
            self._words[sharing.own(thread, sharing.PHASE)] = 1
        self._process = os.getpid()
        self._steps, self._asleep, self._stopped = 0, 0, False
        self._turn = threading.RLock()  # may be asked for again, where memory that goes ends in `leave`
        self._wake = threading.Condition(threading.Lock())
        self._threads: list[threading.Thread] = []
        with suppress(RuntimeError):  # the system gives no more threads: those that there are do all the work
            for thread in range(1, threads):
                name = f"gemma-runtime {thread}"
                started = threading.Thread(target=self._follow, args=(thread,), name=name, daemon=True)
                started.start()
                self._threads.append(started)
        _started.add(self)

    def run(self, code: int) -> int:
        """Runs code of a program; nonzero where a call failed, after which the team can do no more."""
        with self._turn:
            with self._wake:
                self._steps += 1
                if self._asleep:
                    self._wake.notify_all()
            return sharing.lead(self._words, code)

    def leave(self) -> None:
        """Returns when no thread is in any step, nor can come to one that is through."""
        if self._stopped or self._process != os.getpid():  # a child of fork has none of the threads
            return
        with self._turn:
            sharing.lead(self._words, 0)
            while any(self._words[sharing.own(thread + 1, sharing.INSIDE)] for thread in range(len(self._threads))):
                time.sleep(1e-4)

    def stop(self) -> None:
        """Ends the threads."""
        if self._stopped or self._process != os.getpid():
            return
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        for each in self._threads:
            each.join()

    def _follow(self, thread: int) -> None:
        seen = 0
        while not self._stopped:
            steps = self._steps
            seen = sharing.follow(self._words, thread, seen)
            with self._wake:
                self._asleep += 1
                while not self._stopped and self._steps == steps:
                    self._wake.wait()
                self._asleep -= 1


@atexit.register
def _stop_all() -> None:
    """Before the interpreter takes apart what the threads run."""
    for team in list(_started):
        team.stop()


def _compiled(calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> Any:
    """An engine of LLVM that holds `int32 step(int64 *team, int64 thread)`, which makes the calls one after another,
    up to the first that fails."""
    words = np.zeros(sharing.TEAM_WORDS, np.int64)
    index, status = ir.IntType(64), ir.IntType(32)
    module = ir.Module("step")
    kind = ir.FunctionType(status, [index.as_pointer(), index])
    step = ir.Function(module, kind, "step")
    builder = ir.IRBuilder(step.append_basic_block())
    result, error = (builder.alloca(ir.IntType(8).as_pointer()) for _ in range(2))  # unused by calls that give None
    for kernel, arguments in calls:
        address, takes = _machine_code(kernel, (words, 0, *arguments))
        given: list[Any] = [result, error, *_flat(words, step.args[0]), step.args[1]]
        for argument in arguments:
            given += _flat(argument)
        values = [_converted(builder, value, wanted) for value, wanted in zip(given, takes.args, strict=True)]
        function = builder.inttoptr(ir.Constant(index, address), takes.as_pointer())
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
    takes = kernel.targetctx.call_conv.get_function_type(described.restype, described.argtypes)
    return compiled.library.get_pointer_to_function(described.llvm_func_name), takes


def _flat(argument: Any, data: Any = None) -> list[Any]:
    """What numba passes for an argument: of an array (two owners, size, size of an element, address, shape, strides),
    of anything else itself."""
    if not isinstance(argument, np.ndarray):
        return [0 if argument is None else argument]
    address = argument.ctypes.data if data is None else data
    return [0, 0, argument.size, argument.itemsize, address, *argument.shape, *argument.strides]


def _converted(builder: Any, value: Any, wanted: Any) -> Any:
    """A number as a constant of LLVM, or an address as a pointer."""
    if isinstance(value, ir.Value):
        return builder.bitcast(value, wanted) if isinstance(wanted, ir.PointerType) else value
    if isinstance(wanted, ir.PointerType):
        return builder.inttoptr(ir.Constant(ir.IntType(64), int(value)), wanted)
    return ir.Constant(wanted, float(value) if isinstance(wanted, ir.FloatType) else int(value))

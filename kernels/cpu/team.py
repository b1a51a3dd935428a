"""A team of threads, and a step's calls as a list of addresses that all of them run through (sharing.py says how).

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
from runtime.kernels.cpu.compiling import compile_all

_thunks: dict[tuple[Any, ...], tuple[int, Any]] = {}  # by a kernel and its types: an address, and what keeps it valid
_idle: dict[tuple[int, int], list[Team]] = {}  # by process and number of threads
_started: weakref.WeakSet[Team] = weakref.WeakSet()
_thread_word = sharing.thread_word.py_func  # as Python: numba would compile it anew in every process


class Program:
    """Captured calls as data: for each the address of its kernel's thunk, and that of its arguments. It keeps the
    arrays alive whose addresses the arguments hold."""

    def __init__(self, calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
        self._calls = tuple(calls)
        self._arguments, thunks = _linked(self._calls)
        addresses = [arguments.ctypes.data for arguments in self._arguments]
        self._code = np.array([*zip(thunks, addresses, strict=True), (0, 0)], np.int64)
        self._address = self._code.ctypes.data
        self._teams: set[Team] = set()

    def run(self, threads: int, rows: int = sharing.ALL_ROWS) -> None:
        """Runs the calls in order on this many threads, the caller's among them, for the last `rows` rows of their
        arrays (sharing.step_rows). Raises MemoryError if a call cannot allocate its buffers; what the calls write is
        then undefined."""
        idle = _idle.setdefault((os.getpid(), threads), [])
        try:
            team = idle.pop()
        except IndexError:
            team = Team(threads)
        self._teams.add(team)
        try:
            failed = team.run(self._address, rows)
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
            self._words[_thread_word(thread, sharing.PHASE)] = 1
        self._process = os.getpid()
        self._steps, self._asleep, self._stopped = 0, 0, False
        self._lock = threading.RLock()  # reentrant: the garbage collector may call `drain` during `run`
        self._wake = threading.Condition(threading.Lock())
        self._threads: list[threading.Thread] = []
        # Compiled here, not on the threads while the caller does something else: where colorama is installed, numba's
        # compiler sets sys.stdout and sys.stderr back to what they were before it began.
        sharing.follow.compile(tuple(typeof(argument) for argument in (self._words, 0, 0)))
        with suppress(RuntimeError):  # the system refuses more threads: those that started do all the work
            for thread in range(1, threads):
                started = threading.Thread(None, self._follow, f"gemma-runtime {thread}", (thread,), daemon=True)
                started.start()
                self._threads.append(started)
        _started.add(self)

    def run(self, code: int, rows: int = sharing.ALL_ROWS) -> int:
        """Runs a program's code; nonzero if a call failed, after which the team must not be used again."""
        with self._lock:
            with self._wake:
                self._steps += 1
                if self._asleep:
                    self._wake.notify_all()
            return sharing.lead(self._words, code, rows)

    def drain(self) -> None:
        """Returns once no thread is in a step or can still enter one that has ended."""
        if self._stopped or self._process != os.getpid():  # a forked child has none of the threads
            return
        in_step = [_thread_word(thread + 1, sharing.IN_STEP) for thread in range(len(self._threads))]
        with self._lock:
            sharing.lead(self._words, 0, 0)
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


def _linked(calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> tuple[list[Any], list[int]]:
    """Each call's arguments as an array of words, and the address of its kernel's thunk, compiled where it is new."""
    words = np.zeros(sharing.TEAM_WORDS, np.int64)
    kinds: dict[Any, Any] = {}
    keys = [(kernel, *(_kind(argument, kinds) for argument in (words, 0, *arguments))) for kernel, arguments in calls]
    unknown = [key for key in dict.fromkeys(keys) if key not in _thunks]
    compile_all((kernel, tuple(kinds)) for kernel, *kinds in unknown)
    new = {key: _machine_code(*key) for key in unknown}
    if new:
        engine = _compiled_thunks({address: kind for address, kind, _ in new.values()})
        for key, (address, _, compiled) in new.items():
            # Another thread may have linked it meanwhile, whose engine must then stay: programs hold its address.
            _thunks.setdefault(key, (engine.get_function_address(f"thunk_{address}"), (engine, compiled)))
    every_argument = []
    for _, arguments in calls:
        flat = [0, 0, *_flat(words, 0), 0]  # result and error, the team and the thread: the thunk fills them in
        for argument in arguments:
            flat += _flat(argument)
        every_argument.append(np.array([_word(value) for value in flat], np.int64))
    return every_argument, [_thunks[key][0] for key in keys]


def _compiled_thunks(kinds: dict[int, Any]) -> Any:
    """An LLVM engine with `int32 thunk_ADDRESS(int64 *team, int64 thread, int64 *arguments)` for kernels by address,
    which calls one on the words of its arguments, in numba's order, with this team and thread in their places."""
    index, status = ir.IntType(64), ir.IntType(32)
    module = ir.Module("thunks")
    team_at = 2 + _flat(np.zeros(1, np.int64), "team").index("team")  # after result and error
    thread_at = 2 + len(_flat(np.zeros(1, np.int64)))
    for address, kind in kinds.items():
        pointer = index.as_pointer()
        thunk = ir.Function(module, ir.FunctionType(status, [pointer, index, pointer]), f"thunk_{address}")
        team, thread, arguments = thunk.args
        builder = ir.IRBuilder(thunk.append_basic_block())
        values = []
        for place, wanted in enumerate(kind.args):
            if place < 2:  # result and error, unused: the calls return None
                values.append(builder.bitcast(builder.alloca(ir.IntType(8).as_pointer()), wanted))
            elif place == team_at:
                values.append(builder.bitcast(team, wanted))
            elif place == thread_at:
                values.append(thread)
            else:
                word = builder.load(builder.gep(arguments, [index(place)]))
                values.append(_converted(builder, word, wanted))
        function = builder.inttoptr(ir.Constant(index, address), kind.as_pointer())
        builder.ret(builder.call(function, values))
    machine = binding.Target.from_default_triple().create_target_machine(opt=0, jit=True)
    module.triple = binding.get_process_triple()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine


def _machine_code(kernel: Any, *kinds: Any) -> tuple[int, Any, Any]:
    """The address of a kernel's machine code for arguments of these types, its LLVM type, and what keeps it alive."""
    kernel.compile(kinds)
    compiled = kernel.overloads[kinds]
    described = compiled.fndesc
    kind = kernel.targetctx.call_conv.get_function_type(described.restype, described.argtypes)
    return compiled.library.get_pointer_to_function(described.llvm_func_name), kind, compiled


def _kind(argument: Any, known: dict[Any, Any]) -> Any:
    """numba's type of an argument, which takes it 0.1 ms to find: `known` has those found before."""
    key: Any = type(argument), argument
    if isinstance(argument, np.ndarray):
        flags = argument.flags
        layout = flags.c_contiguous, flags.f_contiguous, flags.aligned, flags.writeable
        key = type(argument), argument.dtype, argument.ndim, layout
    if key not in known:
        known[key] = typeof(argument)
    return known[key]


def _flat(argument: Any, address: Any = None) -> list[Any]:
    """What numba passes for a number, or for an array: (two owners, size, itemsize, address, shape, strides)."""
    if not isinstance(argument, np.ndarray):
        return [0 if argument is None else argument]
    address = argument.ctypes.data if address is None else address
    return [0, 0, argument.size, argument.itemsize, address, *argument.shape, *argument.strides]


def _word(value: Any) -> int:
    """A number as 64 bits: fp32 in the lower half."""
    return int(value.view(np.int32)) if isinstance(value, np.float32) else int(value)


def _converted(builder: Any, word: Any, wanted: Any) -> Any:
    """A word as a value of the wanted LLVM type: the inverse of `_word`."""
    if isinstance(wanted, ir.PointerType):
        return builder.inttoptr(word, wanted)
    if isinstance(wanted, ir.FloatType):
        return builder.bitcast(builder.trunc(word, ir.IntType(32)), wanted)
    assert isinstance(wanted, ir.IntType), wanted
    return word if wanted.width == 64 else builder.trunc(word, wanted)

"""A model of one multiprocessor that runs a kernel by the scheduling information in its machine code.

Every warp instruction waits for its stall count and its scoreboards, for its pipe, and for what it reads. Memory is a
set of queues: load/store (128 bytes a clock), L1 (a line comes from L2 once a multiprocessor, then stays, the oldest
goes first), and the weights, which arrive in the order of their requests at the multiprocessor's share of the read
bandwidth. Kernels follow one another by dependent launch: a kernel's programs become resident some clocks after the one
before is complete, and the code behind its wait runs some clocks later still. So the time from one kernel's completion
to the next's depends on the next alone, and a step's time is the sum of its kernels'.

What it leaves out: other multiprocessors (all do the same), misses in L2, bank conflicts, instruction fetch.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


class Kind(IntEnum):
    """What an instruction is to the model."""

    NOTHING = 0
    FMA = 1
    INTEGER_MULTIPLY = 2
    ALU = 3
    UNIFORM = 4
    SLOW = 5  # conversions and special functions
    MMA = 6
    LOAD_WEIGHT = 7
    LOAD = 8
    LOAD_SHARED = 9
    STORE_SHARED = 10
    SHUFFLE = 11
    STORE = 12
    ATOMIC = 13
    COPY_ASYNC = 14
    COMMIT = 15
    WAIT_COPIES = 16
    BARRIER = 17
    WAIT_FOR_KERNEL = 18
    CONSTANT = 19
    EXIT = 20


class Program(NamedTuple):
    """A kernel as one multiprocessor sees it. Traces are [instructions, 6] int64: kind; clocks until the warp's next
    instruction; the scoreboard that is set until the result is there, and the one until the operands have been read, 6
    or more for none; a bit mask of the scoreboards that must be clear; bytes that a thread moves, or for WAIT_COPIES
    the commits that may be under way."""

    first_trace: Array  # of a program's first warp
    other_trace: Array  # of the others
    warps: int  # of a program
    resident: int  # programs that fit the multiprocessor at a time
    programs: int  # that it runs
    weight_bytes: float  # of one warp's weight load
    bytes_per_clock: float  # at which they arrive


class Constants(NamedTuple):
    """The constants of an H100. Latencies and pipes are in clocks.

    The clock and `l1_bytes` were fitted to measured kernels. The clock and `l2` cannot be told apart: 1.9 GHz with 500
    clocks fits equally well. Everything else comes from the literature or arithmetic.
    """

    clock_ghz: float = 1.755
    read_gb_s: float = 3154.3
    multiprocessors: int = 132
    l1: int = 38
    l2: int = 270
    dram: int = 700
    shuffle: int = 24
    shared: int = 30
    slow: int = 24
    constant: int = 40
    mma: int = 33
    barrier: int = 12
    slow_pipe: int = 8  # clocks that a warp instruction occupies it
    mma_pipe: int = 8
    l2_bytes_per_clock: int = 64
    l1_bytes: int = 200_000
    launch: int = 300  # from the completion of the kernel before to residency
    release: int = 1000  # from the same to the end of the wait for it
    flush: int = 300  # from the last program's end to completion


PROGRAMS_AT_MOST = 64  # simulated of one kernel; more are extrapolated from the second half of them


def kernel_us(program: Program, constants: Constants) -> float:
    """Microseconds from the completion of the kernel before to that of this one."""
    count = program.programs
    if count <= PROGRAMS_AT_MOST:
        return _clocks(program, constants) / constants.clock_ghz / 1e3
    half, most = (
        _clocks(program._replace(programs=number), constants) for number in (PROGRAMS_AT_MOST // 2, PROGRAMS_AT_MOST)
    )
    clocks = most + (count - PROGRAMS_AT_MOST) * (most - half) / (PROGRAMS_AT_MOST // 2)
    return clocks / constants.clock_ghz / 1e3


def _clocks(program: Program, constants: Constants) -> int:
    clocks = int(_run(program, constants))
    if clocks < 0:
        raise ValueError("the kernel's warps wait for one another for ever")
    return clocks


SCHEDULERS, MAX_WARPS, SCOREBOARDS = 4, 64, 6
_NEVER = 1 << 60
# A scheduler's pipes; FMA has two halves.
_FMA, _OTHER_FMA, _ALU, _UNIFORM, _SLOW, _MMA, _LOAD_STORE = range(7)
_NO_PIPE = -1
_PIPE_OF = np.full(len(Kind), _NO_PIPE)
_PIPE_OF[[Kind.FMA, Kind.INTEGER_MULTIPLY, Kind.ALU, Kind.UNIFORM]] = _FMA, _FMA, _ALU, _UNIFORM
_PIPE_OF[[Kind.SLOW, Kind.MMA]] = _SLOW, _MMA
_PIPE_OF[Kind.LOAD_WEIGHT : Kind.COPY_ASYNC + 1] = _LOAD_STORE

_compiled: Any = njit  # its type says nothing about its functions' arguments


@_compiled
def _run(program, constants):
    """Clocks from the completion of the kernel before to this one's; -1 for a deadlock."""
    first, other, warps, resident, programs, weight_bytes, rate = program
    length = max(len(first), len(other))
    slots = min(resident, MAX_WARPS // warps)
    # A slot holds a resident program; its warps are slot * warps + i.
    places, ready = np.zeros(slots * warps, np.int64), np.zeros(slots * warps, np.int64)
    boards = np.zeros((slots * warps, SCOREBOARDS), np.int64)
    at_barrier = np.zeros(slots * warps, np.bool_)
    last_copy, commits = np.zeros(slots * warps, np.int64), np.zeros(slots * warps, np.int64)
    commit_times = np.zeros((slots * warps, length + 1), np.int64)
    warps_left, arrived = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
    queues, queued = np.zeros((SCHEDULERS, MAX_WARPS), np.int64), np.zeros(SCHEDULERS, np.int64)
    turn = np.zeros(SCHEDULERS, np.int64)
    pipes = np.zeros((SCHEDULERS, _LOAD_STORE + 1), np.int64)
    line_ready = np.full(length * warps, -1, np.int64)  # when an L1 line of a load of a warp is there, for all programs
    line_order, line_bytes = np.zeros(length * warps + 1, np.int64), np.zeros(length * warps + 1, np.int64)
    oldest, newest, l1_used = 0, 0, 0
    load_store, weights, from_l2 = 0, 0.0, 0.0
    started, ended = 0, 0
    time = 0  # since the programs became resident
    while ended < programs:
        for slot in range(slots):
            if warps_left[slot] or started == programs:
                continue
            base = 0
            for scheduler in range(SCHEDULERS):
                if queued[scheduler] < queued[base]:
                    base = scheduler
            for i in range(warps):
                warp, scheduler = slot * warps + i, (base + i) % SCHEDULERS
                places[warp], ready[warp], at_barrier[warp] = 0, time + 1, False
                boards[warp] = 0
                last_copy[warp], commits[warp] = 0, 0
                queues[scheduler, queued[scheduler]] = warp
                queued[scheduler] += 1
            warps_left[slot], arrived[slot] = warps, 0
            started += 1
        soonest, has_issued = _NEVER, False
        for scheduler in range(SCHEDULERS):
            count = queued[scheduler]
            for offset in range(count):
                at = (turn[scheduler] + offset) % count
                warp = queues[scheduler, at]
                if at_barrier[warp]:
                    continue
                if ready[warp] > time:
                    soonest = min(soonest, ready[warp])
                    continue
                slot, own = warp // warps, warp % warps
                trace = other if own else first
                kind, stall, sets, holds, waits, size = trace[places[warp]]
                needed = 0
                for board in range(SCOREBOARDS):
                    if waits >> board & 1:
                        needed = max(needed, boards[warp, board])
                if kind == Kind.WAIT_FOR_KERNEL:
                    needed = max(needed, constants.release - constants.launch)
                elif kind == Kind.WAIT_COPIES and commits[warp] > size:
                    needed = max(needed, commit_times[warp, commits[warp] - 1 - size])
                if needed > time:
                    ready[warp] = needed
                    soonest = min(soonest, needed)
                    continue
                pipe = _PIPE_OF[kind]
                occupied = constants.slow_pipe if kind == Kind.SLOW else constants.mma_pipe if kind == Kind.MMA else 2
                if kind == Kind.FMA and pipes[scheduler, _FMA] > pipes[scheduler, _OTHER_FMA]:
                    pipe = _OTHER_FMA
                if pipe != _NO_PIPE:
                    if pipes[scheduler, pipe] > time:
                        soonest = min(soonest, pipes[scheduler, pipe])
                        continue
                    pipes[scheduler, pipe] = time + occupied

                done, read = time + 1, time + 6
                moves = max(1, size // 4)  # clocks of 128 bytes
                if kind == Kind.LOAD_WEIGHT or kind == Kind.COPY_ASYNC:
                    load_store = max(load_store, time) + 4
                    if weight_bytes > 0:
                        weights = max(weights, time) + weight_bytes / rate
                        done = max(math.ceil(weights), time + constants.dram)
                    if kind == Kind.COPY_ASYNC:
                        last_copy[warp] = max(last_copy[warp], done)
                    read = time + 12
                elif kind == Kind.LOAD:
                    load_store = max(load_store, time) + moves
                    line = places[warp] * warps + own
                    if line_ready[line] < 0:
                        from_l2 = max(from_l2, time) + 32.0 * size / constants.l2_bytes_per_clock
                        done = max(math.ceil(from_l2), load_store) + constants.l2
                        line_ready[line] = done
                        line_order[newest], line_bytes[newest] = line, 32 * size
                        newest = (newest + 1) % len(line_order)
                        l1_used += 32 * size
                        while l1_used > constants.l1_bytes:
                            line_ready[line_order[oldest]] = -1
                            l1_used -= line_bytes[oldest]
                            oldest = (oldest + 1) % len(line_order)
                    else:
                        done = max(load_store + constants.l1, line_ready[line])
                    read = time + 12
                elif kind == Kind.LOAD_SHARED:
                    load_store = max(load_store, time) + moves
                    done = load_store + constants.shared
                elif kind == Kind.STORE_SHARED:
                    load_store = max(load_store, time) + moves
                    done, read = load_store + constants.shared, load_store + 8
                elif kind == Kind.SHUFFLE:
                    load_store = max(load_store, time) + 1
                    done = load_store + constants.shuffle
                elif kind == Kind.STORE or kind == Kind.ATOMIC:
                    load_store = max(load_store, time) + (moves if kind == Kind.STORE else 1)
                    done, read = time + constants.flush, load_store + 8
                elif kind == Kind.SLOW:
                    done = time + constants.slow
                elif kind == Kind.CONSTANT:
                    done = time + constants.constant
                elif kind == Kind.MMA:
                    done = time + constants.mma
                elif kind == Kind.COMMIT:
                    commit_times[warp, commits[warp]] = last_copy[warp]
                    commits[warp] += 1
                if sets < SCOREBOARDS:
                    boards[warp, sets] = max(boards[warp, sets], done)
                if holds < SCOREBOARDS:
                    boards[warp, holds] = max(boards[warp, holds], read)
                ready[warp] = time + max(1, stall)
                if kind == Kind.BARRIER:
                    arrived[slot] += 1
                    at_barrier[warp] = True
                    if arrived[slot] == warps:
                        arrived[slot] = 0
                        opens = max(ready[warp], time + constants.barrier)
                        for mate in range(slot * warps, (slot + 1) * warps):
                            if at_barrier[mate]:
                                at_barrier[mate], ready[mate] = False, opens
                places[warp] += 1
                if kind == Kind.EXIT or places[warp] >= len(trace):
                    for behind in range(at + 1, count):
                        queues[scheduler, behind - 1] = queues[scheduler, behind]
                    queued[scheduler] -= 1
                    warps_left[slot] -= 1
                    ended += warps_left[slot] == 0
                else:
                    turn[scheduler] = (at + 1) % count
                has_issued = True
                break
        if has_issued:
            time += 1
        elif soonest == _NEVER:
            return -1
        else:
            time = max(time + 1, soonest)
    return constants.launch + time - 1 + constants.flush

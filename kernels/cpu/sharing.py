"""How a team's threads share the calls of a decode step: work stealing, with backups for threads that are descheduled.

Every thread runs every call. A call is one or more phases, each split into chunks:

    chunk = claim(team, thread, chunks)
    while chunk >= 0:
        ...  # compute the chunk into buffers of the thread's own
        if begin_publish(team, thread, chunk):
            ...  # copy the result to where the next phase reads it
            end_publish(team, thread, chunk)
        chunk = claim(team, thread, chunks)

A thread claims the chunks of its own share, then those that others have not begun. When all are claimed it waits a
little for the unfinished ones and then recomputes those itself, so a descheduled thread delays no other; the first of
several results is published. A phase ends when all its chunks are published, and its inputs do not change before that.
A late thread may read what a later phase has written, but finds its chunk published and drops the result. Hence a call
writes shared memory only between begin_publish (or single) and end_publish; the number of its phases and chunks depends
only on shapes and on the number of threads; and an index that a late thread reads may be stale but never out of bounds.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from runtime.kernels.cpu.atomics import (
    atomic_load,
    atomic_store,
    call_thunk,
    compare_and_swap,
    load_word,
    pause,
    sched_yield,
)
from runtime.kernels.cpu.cache import compiled

# A chunk's ticket is 4 * phase + its state. Phase numbers only grow, so an older ticket means "not begun".
CLAIMED, PUBLISHING, PUBLISHED = 1, 2, 3

MAX_THREADS, MAX_CHUNKS, MAX_ROWS = 256, 2048, 64
CHUNK_BYTES = 65536  # of weights: microseconds to read, many times the cost of a claim
ALL_ROWS = 1 << 30
# A team is an array of int64. First the words that all threads share. SEQUENCE guards the step's CODE, FIRST_PHASE and
# ROWS as a sequence lock does: it is odd while they are written.
THREADS, SEQUENCE, CODE, FIRST_PHASE, FAILED, ROWS = range(6)
# Then a cache line for each thread's own words, the tickets, and the partial results.
_THREAD_WORDS, _WORDS_PER_THREAD = 16, 8
PHASE, CURSOR, IN_STEP, OWN_ROWS = range(4)
_TICKETS = _THREAD_WORDS + MAX_THREADS * _WORDS_PER_THREAD
_PARTIALS = _TICKETS + MAX_CHUNKS
TEAM_WORDS = _PARTIALS + MAX_CHUNKS * MAX_ROWS
# A spin takes 15 to 50 ns: a thread computes another's chunk after the time of a few chunks, and sleeps after the time
# that a caller with little to do takes between two steps.
SPINS_BEFORE_BACKUP, SPINS_BEFORE_SLEEP = 1000, 4000


@njit(inline="always")
def thread_word(thread, word):
    return _THREAD_WORDS + thread * _WORDS_PER_THREAD + word


@compiled
def spin(spins):
    """One iteration of a spin loop; after many, it yields the core to other processes."""
    if spins < SPINS_BEFORE_BACKUP:
        pause()
    else:
        sched_yield()


@njit(inline="always")
def share(count, thread, threads):
    """A thread's contiguous share of `count` items: (first, one past the last)."""
    return count * thread // threads, count * (thread + 1) // threads


@compiled
def _next_phase(team, thread):
    team[thread_word(thread, PHASE)] += 1
    team[thread_word(thread, CURSOR)] = 0


@compiled
def claim(team, thread, chunks):
    """A chunk of the current phase for this thread to compute; -1 once all are published, which ends the phase."""
    claimed = 4 * team[thread_word(thread, PHASE)] + CLAIMED
    first, end = share(chunks, thread, team[THREADS])
    while team[thread_word(thread, CURSOR)] < chunks:  # its own share, then backwards, from the end of others' shares
        cursor = team[thread_word(thread, CURSOR)]
        team[thread_word(thread, CURSOR)] += 1
        chunk = first + cursor if first + cursor < end else (first - 1 - (cursor - (end - first))) % chunks
        ticket = atomic_load(team, _TICKETS + chunk)
        if ticket < claimed and compare_and_swap(team, _TICKETS + chunk, ticket, claimed):
            return chunk
    for offset in range(chunks):
        chunk = (first + offset) % chunks
        spins = 0
        while not team[FAILED]:
            ticket = atomic_load(team, _TICKETS + chunk)
            if ticket >= claimed - CLAIMED + PUBLISHED:
                break
            if ticket == claimed and spins >= SPINS_BEFORE_BACKUP:
                return chunk
            spin(spins)
            spins += 1
    _next_phase(team, thread)
    return -1


@compiled
def begin_publish(team, thread, chunk):
    """Whether this thread is the first to have computed a chunk; then it writes the result and calls end_publish."""
    phase = 4 * team[thread_word(thread, PHASE)]
    return compare_and_swap(team, _TICKETS + chunk, phase + CLAIMED, phase + PUBLISHING)


@compiled
def end_publish(team, thread, chunk):
    atomic_store(team, _TICKETS + chunk, 4 * team[thread_word(thread, PHASE)] + PUBLISHED)


@compiled
def single(team, thread):
    """A short phase that one thread runs and no other backs up: True for that thread, which then calls end_publish
    with chunk 0; False for every thread once it is done."""
    phase = 4 * team[thread_word(thread, PHASE)]
    spins = 0
    while not team[FAILED]:
        ticket = atomic_load(team, _TICKETS)
        if ticket >= phase + PUBLISHED:
            break
        if ticket < phase + CLAIMED and compare_and_swap(team, _TICKETS, ticket, phase + PUBLISHING):
            return True
        spin(spins)
        spins += 1
    _next_phase(team, thread)
    return False


@njit(inline="always")
def store_partial(team, place, value, index):
    """Keeps an fp32 value and an index below 2^32 for a later phase."""
    team[_PARTIALS + place] = np.int64(np.float32(value).view(np.int32)) << 32 | np.int64(index)


@njit(inline="always")
def load_partial(team, place):
    word = team[_PARTIALS + place]
    return np.int32(word >> 32).view(np.float32), word & np.int64(0xFFFFFFFF)


def step_rows(team, thread, array):
    """The rows of a call's array, or None, that this step computes: its last ones, as many as the step was started
    for. How many is data, so one capture serves every number; the last row, which the head reads, stays in place."""


@overload(step_rows)
def _step_rows(team, thread, array):
    if isinstance(array, types.NoneType):
        return lambda team, thread, array: None
    return lambda team, thread, array: array[max(0, len(array) - team[thread_word(thread, OWN_ROWS)]) :]


@compiled
def run_code(code, team, thread):
    """Runs a thread's part of a step, given the address of its calls: pairs of a thunk and its words, up to a zero.
    Returns 0, or 1 if a call failed."""
    place = 0
    while load_word(code, place):
        if call_thunk(load_word(code, place), team, thread, load_word(code, place + 1)):
            atomic_store(team, FAILED, 1)
            return 1
        place += 2
    return 0


@compiled
def lead(team, code, rows):
    """Starts a step of a number of rows for the followers and runs it as thread 0. Returns 0, or 1 if a call failed.
    With code 0 it only withdraws the last step."""
    atomic_store(team, SEQUENCE, team[SEQUENCE] + 1)
    atomic_store(team, CODE, code)
    atomic_store(team, FIRST_PHASE, team[thread_word(0, PHASE)])
    atomic_store(team, ROWS, rows)
    atomic_store(team, SEQUENCE, team[SEQUENCE] + 1)
    team[thread_word(0, OWN_ROWS)] = rows
    return run_code(code, team, 0) if code else 0


@compiled
def follow(team, thread, last_sequence):
    """Runs steps as a thread other than 0 until none has come for a while. `last_sequence` is that of the last step it
    ran; returns the new one."""
    spins = 0
    while spins < SPINS_BEFORE_SLEEP:
        sequence = atomic_load(team, SEQUENCE)
        if sequence == last_sequence or sequence % 2:
            spin(min(spins, SPINS_BEFORE_BACKUP - 1))
            spins += 1
            continue
        atomic_store(team, thread_word(thread, IN_STEP), 1)
        code, phase, rows = atomic_load(team, CODE), atomic_load(team, FIRST_PHASE), atomic_load(team, ROWS)
        if atomic_load(team, SEQUENCE) == sequence:
            last_sequence, spins = sequence, 0
            if code:
                team[thread_word(thread, PHASE)], team[thread_word(thread, CURSOR)] = phase, 0
                team[thread_word(thread, OWN_ROWS)] = rows
                run_code(code, team, thread)
        atomic_store(team, thread_word(thread, IN_STEP), 0)
    return last_sequence

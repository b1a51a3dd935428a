"""A team: threads that take the calls of a step together (team.py starts them).

Every thread runs every call, and a call is one or more phases of so many chunks. A thread takes a chunk that nobody
has begun, computes it into memory of its own, and writes it if nobody else has meanwhile. Where none is left to
begin, it waits a moment for those who still compute, then does their chunks as well: a thread that the system has
taken off its core holds nobody up, however long it is away. A phase is over when all its chunks are written, and only
then does anything that they were computed from change; so what a late thread computes, perhaps from what a later
phase has changed, finds its chunk written and goes nowhere. That asks three things of a call: it writes only between
may_write (or alone) and written, the number of its phases and chunks follows from shapes and the number of threads
alone, and what a late thread may read can be wrong but not out of bounds.

A chunk's ticket is 4 * phase + one of the following. Phases are numbered on and on, so that an old ticket says that
nobody has begun.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from runtime.kernels.cpu.atomics import pause, read, run_code, sched_yield, swap, write
from runtime.kernels.cpu.cache import compiled

BEGUN, WRITING, WRITTEN = 1, 2, 3

MOST_THREADS, MOST_CHUNKS, MOST_ROWS = 256, 2048, 8
CHUNK_BYTES = 65536  # of weights: some microseconds' reading, many times what taking it costs
# The words of a team: first what all share, ...
THREADS, POSTED, CODE, FROM, FAILED = range(5)
# ... then a line of the cache for each thread's own, then the tickets, then what `note` notes.
_OF_THREAD, _WORDS_OF_THREAD = 16, 8
PHASE, TURN, INSIDE = range(3)
_TICKETS = _OF_THREAD + MOST_THREADS * _WORDS_OF_THREAD
_NOTES = _TICKETS + MOST_CHUNKS
TEAM_WORDS = _NOTES + MOST_CHUNKS * MOST_ROWS
# How often a thread looks before it does another's chunk, and before it sleeps between steps: each time some 15 to 50
# nanoseconds, so together the time of a few chunks, and that of a caller who does little with each token.
PATIENCE, ATTENTION = 1000, 4000


@njit(inline="always")
def own(thread, word):
    return _OF_THREAD + thread * _WORDS_OF_THREAD + word


@compiled
def wait(waited):
    """Lets some time pass; more, and for others to use, where there has been waiting for long."""
    if waited < PATIENCE:
        pause()
    else:
        sched_yield()


@njit(inline="always")
def share(count, thread, threads):
    """Which of `count` items a thread takes, one stretch of memory: (first, one past the last)."""
    return count * thread // threads, count * (thread + 1) // threads


@compiled
def _next_phase(team, thread):
    team[own(thread, PHASE)] += 1
    team[own(thread, TURN)] = 0


@compiled
def take(team, thread, chunks):
    """A chunk of the current phase for a thread to compute; -1 once all are written, and the phase is over."""
    begun = 4 * team[own(thread, PHASE)] + BEGUN
    first, end = share(chunks, thread, team[THREADS])
    while team[own(thread, TURN)] < chunks:  # its own share, then those before it from their ends
        turn = team[own(thread, TURN)]
        team[own(thread, TURN)] += 1
        chunk = first + turn if first + turn < end else (first - 1 - (turn - (end - first))) % chunks
        ticket = read(team, _TICKETS + chunk)
        if ticket < begun and swap(team, _TICKETS + chunk, ticket, begun):
            return chunk
    for turn in range(chunks):
        chunk = (first + turn) % chunks
        waited = 0
        while not team[FAILED]:
            ticket = read(team, _TICKETS + chunk)
            if ticket >= begun - BEGUN + WRITTEN:
                break
            if ticket == begun and waited >= PATIENCE:
                return chunk
            wait(waited)
            waited += 1
    _next_phase(team, thread)
    return -1


@compiled
def may_write(team, thread, chunk):
    """Whether a thread that has computed a chunk is the first; then it writes it and says `written`."""
    phase = 4 * team[own(thread, PHASE)]
    return swap(team, _TICKETS + chunk, phase + BEGUN, phase + WRITING)


@compiled
def written(team, thread, chunk):
    """Says that a chunk is in its place."""
    write(team, _TICKETS + chunk, 4 * team[own(thread, PHASE)] + WRITTEN)


@compiled
def alone(team, thread):
    """A phase of one chunk, short and not to be computed twice: True for the one thread that does it and then says
    `written` of chunk 0, False for all once that is done."""
    phase = 4 * team[own(thread, PHASE)]
    waited = 0
    while not team[FAILED]:
        ticket = read(team, _TICKETS)
        if ticket >= phase + WRITTEN:
            break
        if ticket < phase + BEGUN and swap(team, _TICKETS, ticket, phase + WRITING):
            return True
        wait(waited)
        waited += 1
    _next_phase(team, thread)
    return False


@njit(inline="always")
def note(team, place, value, index):
    """Keeps an fp32 value and an index below 2^32 for a later phase."""
    team[_NOTES + place] = np.int64(np.float32(value).view(np.int32)) << 32 | np.int64(index)


@njit(inline="always")
def noted(team, place):
    word = team[_NOTES + place]
    return np.int32(word >> 32).view(np.float32), word & np.int64(0xFFFFFFFF)


@compiled
def lead(team, code):
    """Takes a step as the team's thread 0, together with those of the others that come; with 0 for code there is none.
    Returns its status: 0, or that a call failed."""
    write(team, POSTED, team[POSTED] + 1)  # odd: whoever reads the following may read half of it
    write(team, CODE, code)
    write(team, FROM, team[own(0, PHASE)])
    write(team, POSTED, team[POSTED] + 1)
    return run_code(code, team, 0) if code else 0


@compiled
def follow(team, thread, seen):
    """Takes part in steps, as one of a team's other threads, until none has come for a while. `seen` is what POSTED was
    at the last one; returns what it is now."""
    waited = 0
    while waited < ATTENTION:
        posted = read(team, POSTED)
        if posted == seen or posted % 2:
            wait(min(waited, PATIENCE - 1))
            waited += 1
            continue
        write(team, own(thread, INSIDE), 1)
        code, phase = read(team, CODE), read(team, FROM)
        if read(team, POSTED) == posted:
            seen, waited = posted, 0
            if code:
                team[own(thread, PHASE)], team[own(thread, TURN)] = phase, 0
                run_code(code, team, thread)
        write(team, own(thread, INSIDE), 0)
    return seen

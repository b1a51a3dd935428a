"""The decode step's operations fused for CPUs, compiled by numba: what a decode loop runs there in place of references.

Formulas and roundings are those of each operation's own file. What differs is the order of summation, and it is fixed
here: a product of two rows is BLOCK running sums, added in pairs at the end, whatever the number of rows or
threads or the width of the processor's vectors. A row has the same bits alone, in a batch and on every machine.

Decoding reads each weight once, and a core must keep enough reads under way to get its share of the memory's bandwidth.
`_sums` is therefore written in LLVM's own terms: wide vectors, bf16 widened in registers, reads ahead of their use. A
plain loop compiled by numba reaches two thirds of that. torch.compile, the other candidate, decodes a third as fast (19
tokens/s to 57, the demo in bf16, bench/results/compare-cpu-bfloat16-all.json) and needs a C++ compiler on every machine
that runs it.

A call of a step is shared among threads chunk by chunk ("A team", below), so that a thread that other processes keep
from its core holds nobody up.

All in one file, since numba keeps compiled code on disk for as long as the file it comes from stays as it is. bf16
arrives as uint16, for NumPy has no such type.
"""

from __future__ import annotations

import math
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.extending import overload

from runtime.kernels.cpu_cache import cached

intrinsic: Any = extending.intrinsic  # its annotation keeps the argument that callers leave out

LANES, VECTORS = 16, 4
BLOCK = LANES * VECTORS
LINE = 64  # bytes
# How many bytes of a weight matrix are read before their turn: into the second-level cache from just over a page away,
# where the processor's own reading ahead ends, and from there into the first. A step of the demo on the machine of the
# README takes 7 to 15 % longer without the former, 7 % without the latter and 26 to 34 % without both; half or twice as
# far away, 3 to 8 %.
FAR_AHEAD, NEAR_AHEAD = 4096 + 128, 512
KEYS_AHEAD = 16  # keys whose values are read before their turn, into the second-level cache
FIRST_LEVEL, SECOND_LEVEL = 3, 2  # what LLVM calls locality

_FLOAT, _INDEX, _INT, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)


def part(function: Any) -> Any:
    """A function compiled when it is first called, and kept on disk.

    Products accumulate by fused multiply-adds alone; nothing else may be reordered or fused.
    """
    dispatcher: Any = njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = cached(function)  # as numba's cache=True does, with a cache that forgives
    return dispatcher


def _load(builder: Any, row: Any, column: Any, dtype: Any) -> Any:
    """LANES elements of a row as fp32."""
    address = builder.gep(row, [column])
    if dtype == types.float32:
        return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)
    packed = builder.load(builder.bitcast(address, ir.VectorType(ir.IntType(16), LANES).as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(packed, _INTS), ir.Constant(_INTS, [16] * LANES)), _VECTOR)


def _starts_line(vector: int, dtype: Any) -> bool:
    """Whether the elements that are the vector of this number in a block are the first ones of a line of the cache."""
    return vector * LANES * dtype.bitwidth // 8 % LINE == 0


def _sum_of_lanes(builder: Any, vector: Any) -> Any:
    """The upper half of the lanes is added to the lower one until a single lane is left."""
    width = LANES
    while width > 1:
        width //= 2
        lower, upper = (
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_INT, width), list(lanes)))
            for lanes in (range(width), range(width, 2 * width))
        )
        vector = builder.fadd(lower, upper)
    return builder.extract_element(vector, _INT(0))


class _Parts:
    """What an intrinsic's generator starts from: its array arguments by name, integers as the processor's own, and
    LLVM's functions."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, names: str) -> None:
        self._context, self._builder = context, builder
        self._types = dict(zip(names.split(), signature.args, strict=True))
        self._values = dict(zip(names.split(), arguments, strict=True))
        self.fma = self._function(f"llvm.fma.v{LANES}f32", _VECTOR, _VECTOR, _VECTOR, _VECTOR)
        self._prefetch = self._function("llvm.prefetch.p0", ir.VoidType(), _BYTE.as_pointer(), _INT, _INT, _INT)

    def _function(self, name: str, result: Any, *takes: Any) -> Any:
        return cgutils.get_or_insert_function(self._builder.module, ir.FunctionType(result, takes), name)

    def array(self, name: str) -> tuple[Any, Any, Any]:
        """(address of the first element, length of a row, dtype) of a contiguous [rows, columns]."""
        kind = self._types[name]
        array = self._context.make_array(kind)(self._context, self._builder, self._values[name])
        return array.data, cgutils.unpack_tuple(self._builder, array.shape)[1], kind.dtype

    def index(self, name: str) -> Any:
        return self._context.cast(self._builder, self._values[name], self._types[name], types.intp)

    def literal(self, name: str) -> int:
        return self._types[name].literal_value

    def read_ahead(self, address: Any, ahead: Any, level: int) -> None:
        """Starts reading what lies `ahead` bytes beyond an address into a cache."""
        at = self._builder.gep(self._builder.bitcast(address, _BYTE.as_pointer()), [ahead])
        self._builder.call(self._prefetch, [at, _INT(0), _INT(level), _INT(1)])


def _counted(builder: Any, last: Any, step: int, sums: list[Any], body: Any) -> list[Any]:
    """for index in range(0, last, step): sums = body(index, sums), the sums being vectors kept in registers."""
    entry = builder.block
    head, inside, end = (builder.append_basic_block(name) for name in ("loop", "loop.body", "loop.end"))
    builder.branch(head)
    builder.position_at_end(head)
    index, phis = builder.phi(_INDEX), [builder.phi(_VECTOR) for _ in sums]
    builder.cbranch(builder.icmp_signed("<", index, last), inside, end)
    builder.position_at_end(inside)
    raised = body(index, phis)
    index.add_incoming(_INDEX(0), entry)
    index.add_incoming(builder.add(index, _INDEX(step)), builder.block)
    for phi, before, after in zip(phis, sums, raised, strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(after, builder.block)
    builder.branch(head)
    builder.position_at_end(end)
    return phis


@intrinsic(prefer_literal=True)
def _sums(typing_context, out, place, weight, index, x, first, rows):
    """out[place, first + r] = the product of weight[index] and x[first + r] for r < rows, over the columns that fill
    whole blocks. `rows` is a literal; the weights are read once for all of them."""
    signature = types.void(out, place, weight, index, x, first, rows)

    def generate(context, builder, signature, arguments):
        parts = _Parts(context, builder, signature, arguments, "out place weight index x first rows")
        (out, all_rows, _), (x, columns, x_type) = parts.array("out"), parts.array("x")
        weight, _, weight_type = parts.array("weight")
        weight_row = builder.gep(weight, [builder.mul(parts.index("index"), columns)])
        numbers = [builder.add(parts.index("first"), _INDEX(row)) for row in range(parts.literal("rows"))]
        x_rows = [builder.gep(x, [builder.mul(number, columns)]) for number in numbers]
        out_row = builder.gep(out, [builder.mul(parts.index("place"), all_rows)])

        def one_block(column, sums):
            raised = []
            for vector in range(VECTORS):
                at = builder.add(column, _INDEX(vector * LANES))
                if _starts_line(vector, weight_type):  # line by line: fp32 read a block at a time comes a tenth slower
                    here = builder.gep(weight_row, [at])
                    parts.read_ahead(here, _INDEX(FAR_AHEAD), SECOND_LEVEL)
                    parts.read_ahead(here, _INDEX(NEAR_AHEAD), FIRST_LEVEL)
                loaded = _load(builder, weight_row, at, weight_type)
                for row, x_row in enumerate(x_rows):
                    activation = _load(builder, x_row, at, x_type)
                    raised.append(builder.call(parts.fma, [loaded, activation, sums[vector * len(x_rows) + row]]))
            return raised

        whole = builder.mul(builder.sdiv(columns, _INDEX(BLOCK)), _INDEX(BLOCK))
        zeros = [ir.Constant(_VECTOR, [0.0] * LANES)] * (VECTORS * len(x_rows))
        sums = _counted(builder, whole, BLOCK, zeros, one_block)
        for row, number in enumerate(numbers):
            pairs = sums[row :: len(x_rows)]
            while len(pairs) > 1:
                pairs = [builder.fadd(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
            builder.store(_sum_of_lanes(builder, pairs[0]), builder.gep(out_row, [number]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def _mix(typing_context, out, weights, start, values, slot, count, dim, first, rows):
    """out[first + r, dim : dim + BLOCK] += the sum over i < count, in this order, of weights[first + r, start + i] *
    values[slot + i, dim : dim + BLOCK], for r < rows. `rows` is a literal; the values are read once for all of them."""
    signature = types.void(out, weights, start, values, slot, count, dim, first, rows)

    def generate(context, builder, signature, arguments):
        parts = _Parts(context, builder, signature, arguments, "out weights start values slot count dim first rows")
        (out, head_dim, _), (weights, keys, _) = parts.array("out"), parts.array("weights")
        values, _, value_type = parts.array("values")
        numbers = [builder.add(parts.index("first"), _INDEX(row)) for row in range(parts.literal("rows"))]
        weight_rows = [
            builder.gep(weights, [builder.add(builder.mul(number, keys), parts.index("start"))]) for number in numbers
        ]
        value_row = builder.gep(values, [builder.add(builder.mul(parts.index("slot"), head_dim), parts.index("dim"))])
        places = [
            builder.bitcast(
                builder.gep(out, [builder.add(builder.mul(number, head_dim), column)]), _VECTOR.as_pointer()
            )
            for number in numbers
            for column in [builder.add(parts.index("dim"), _INDEX(vector * LANES)) for vector in range(VECTORS)]
        ]
        ahead = builder.mul(head_dim, _INDEX(KEYS_AHEAD * value_type.bitwidth // 8))

        def one_key(key, sums):
            row_start = builder.mul(key, head_dim)
            loaded, raised = [], []
            for vector in range(VECTORS):
                at = builder.add(row_start, _INDEX(vector * LANES))
                if _starts_line(vector, value_type):
                    parts.read_ahead(builder.gep(value_row, [at]), ahead, SECOND_LEVEL)
                loaded.append(_load(builder, value_row, at, value_type))
            for row, weight_row in enumerate(weight_rows):
                one = builder.insert_element(
                    ir.Constant(_VECTOR, ir.Undefined), builder.load(builder.gep(weight_row, [key])), _INT(0)
                )
                weight = builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))
                for vector in range(VECTORS):
                    raised.append(builder.call(parts.fma, [loaded[vector], weight, sums[row * VECTORS + vector]]))
            return raised

        before = [builder.load(place, align=4) for place in places]
        sums = _counted(builder, parts.index("count"), 1, before, one_key)
        for place, total in zip(places, sums, strict=True):
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return signature, generate


# A team: threads that take the calls of a step together (cpu_team.py starts them).
#
# Every thread runs every call, and a call is one or more phases of so many chunks. A thread takes a chunk that nobody
# has begun, computes it into memory of its own, and writes it if nobody else has meanwhile. Where none is left to
# begin, it waits a moment for those who still compute, then does their chunks as well: a thread that the system has
# taken off its core holds nobody up, however long it is away. A phase is over when all its chunks are written, and only
# then does anything that they were computed from change; so what a late thread computes, perhaps from what a later
# phase has changed, finds its chunk written and goes nowhere. That asks three things of a call: it writes only between
# may_write (or alone) and written, the number of its phases and chunks follows from shapes and the number of threads
# alone, and what a late thread may read can be wrong but not out of bounds.
#
# A chunk's ticket is 4 * phase + one of the following. Phases are numbered on and on, so that an old ticket says that
# nobody has begun.
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


def _word(context, builder, signature, arguments):
    team = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(team.data, [context.cast(builder, arguments[1], signature.args[1], types.intp)])


@intrinsic
def read(typing_context, team, index):
    """A word of a team, and with it all that was written before the word was."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_word(context, builder, signature, arguments), "seq_cst", 8)

    return types.int64(team, index), generate


@intrinsic
def write(typing_context, team, index, value):
    """Sets a word of a team, for all to see after what was written before it."""

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[2], signature.args[2], types.int64)
        builder.store_atomic(value, _word(context, builder, signature, arguments), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(team, index, value), generate


@intrinsic
def swap(typing_context, team, index, old, new):
    """Sets a word of a team to `new` if it is `old`, and says whether it was."""

    def generate(context, builder, signature, arguments):
        old, new = (context.cast(builder, arguments[i], signature.args[i], types.int64) for i in (2, 3))
        word = _word(context, builder, signature, arguments)
        return builder.extract_value(builder.cmpxchg(word, old, new, "seq_cst", "seq_cst"), 1)

    return types.boolean(team, index, old, new), generate


@intrinsic
def pause(typing_context):
    """Tells the processor that this is a loop that waits."""

    def generate(context, builder, signature, arguments):
        if platform.machine() == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def run_code(typing_context, code, team, thread):
    """Runs a thread's part of compiled calls (cpu_team.py) by their address. Returns 0, or that a call failed."""

    def generate(context, builder, signature, arguments):
        words = context.make_array(signature.args[1])(context, builder, arguments[1]).data
        kind = ir.FunctionType(_INT, [words.type, _INDEX])
        status = builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [words, arguments[2]])
        return builder.sext(status, _INDEX)

    return types.int64(types.int64, team, types.int64), generate


sched_yield = types.ExternalFunction("sched_yield", types.int32())


@njit(inline="always")
def own(thread, word):
    return _OF_THREAD + thread * _WORDS_OF_THREAD + word


@part
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


@part
def _next_phase(team, thread):
    team[own(thread, PHASE)] += 1
    team[own(thread, TURN)] = 0


@part
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


@part
def may_write(team, thread, chunk):
    """Whether a thread that has computed a chunk is the first; then it writes it and says `written`."""
    phase = 4 * team[own(thread, PHASE)]
    return swap(team, _TICKETS + chunk, phase + BEGUN, phase + WRITING)


@part
def written(team, thread, chunk):
    """Says that a chunk is in its place."""
    write(team, _TICKETS + chunk, 4 * team[own(thread, PHASE)] + WRITTEN)


@part
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


@part
def lead(team, code):
    """Takes a step as the team's thread 0, together with those of the others that come; with 0 for code there is none.
    Returns its status: 0, or that a call failed."""
    write(team, POSTED, team[POSTED] + 1)  # odd: whoever reads the following may read half of it
    write(team, CODE, code)
    write(team, FROM, team[own(0, PHASE)])
    write(team, POSTED, team[POSTED] + 1)
    return run_code(code, team, 0) if code else 0


@part
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


def wide(value, array):
    """An element of an array as fp32."""


def narrow(value, array):
    """An fp32 value as an element of an array: rounded to the array's dtype, to even."""


@overload(wide, inline="always")
def _wide(value, array):
    if array.dtype == types.float32:
        return lambda value, array: value
    return lambda value, array: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


@overload(narrow, inline="always")
def _narrow(value, array):
    if array.dtype == types.float32:
        return lambda value, array: value

    def to_bfloat16(value, array):
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return to_bfloat16


@njit(inline="always")
def rounded(value, array):
    """An fp32 value rounded to an array's dtype, still as fp32."""
    return wide(narrow(value, array), array)


LOG2_E, LN_2, LN_2_REST = (np.float32(value) for value in (1.44269504, 0.693359375, -2.12194440e-4))


@njit(inline="always")
def exp(x):
    """e^x in fp32 within one unit in the last place (Cephes' polynomial); 0 below -87.7, infinite above 88.4.

    In arithmetic alone, which LLVM does for several elements at once; math.exp is a call for each of them.
    """
    x = min(max(x, np.float32(-88.0)), np.float32(89.0))
    power = np.floor(x * LOG2_E + np.float32(0.5))
    rest = x - power * LN_2 - power * LN_2_REST
    y = np.float32(1.9875691500e-4) * rest + np.float32(1.3981999507e-3)
    y = y * rest + np.float32(8.3334519073e-3)
    y = y * rest + np.float32(4.1665795894e-2)
    y = y * rest + np.float32(1.6666665459e-1)
    y = y * rest + np.float32(5.0000001201e-1)
    y = y * rest * rest + rest + np.float32(1.0)
    return y * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)


@part
def products(sums, count, weight, first, x):
    """sums[i, r] = the product of weight[first + i] and x[r], in fp32, for i < count.

    sums [at least count, rows] and x [rows, columns] are fp32, weight [outputs, columns] of the model's dtype.
    """
    rows, columns = x.shape
    whole = columns - columns % BLOCK
    for place in range(count):
        index, row = first + place, 0
        while rows - row >= 4:
            _sums(sums, place, weight, index, x, row, 4)
            row += 4
        if rows - row >= 2:
            _sums(sums, place, weight, index, x, row, 2)
            row += 2
        if rows > row:
            _sums(sums, place, weight, index, x, row, 1)
        for column in range(whole, columns):
            value = wide(weight[index, column], weight)
            for row in range(rows):
                sums[place, row] += value * x[row, column]


@part
def norm(out, x, weight, eps, like):
    """out = rms_norm(x), all fp32, rounded to the dtype of `like`; `weight` is of the model's dtype."""
    square, as_row = np.empty((1, 1), np.float32), x.reshape(1, len(x))
    products(square, 1, as_row, 0, as_row)
    inverse = np.float32(1.0) / np.float32(math.sqrt(square[0, 0] / np.float32(len(x)) + eps))
    for column in range(len(x)):
        out[column] = rounded(x[column] * inverse * (np.float32(1.0) + wide(weight[column], weight)), like)


@part
def widened(x):
    """[rows, columns] as fp32."""
    out = np.empty(x.shape, np.float32)
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            out[row, column] = wide(x[row, column], x)
    return out


@part
def residual_stream(x, branch, branch_norm, eps):
    """The residual stream [rows, hidden] as fp32, after a branch has joined it, if there is one."""
    stream = widened(x)
    if branch is not None:
        joining = widened(branch)
        for row in range(len(stream)):
            norm(joining[row], joining[row], branch_norm, eps, x)
            for column in range(stream.shape[1]):
                stream[row, column] = rounded(stream[row, column] + joining[row, column], x)
    return stream


@part
def normed(stream, norm_weight, eps, like):
    """The norm of each row of a residual stream, [rows, hidden] fp32."""
    out = np.empty_like(stream)
    for row in range(len(stream)):
        norm(out[row], stream[row], norm_weight, eps, like)
    return out


@part
def keep(residual_out, stream):
    """Stores a residual stream, where there is a place for it."""
    if residual_out is not None:
        for row in range(len(stream)):
            for column in range(stream.shape[1]):
                residual_out[row, column] = narrow(stream[row, column], residual_out)


@njit(inline="always")
def outputs_at_once(outputs, bytes_each, threads):
    """How many outputs of a matrix make a chunk: CHUNK_BYTES of weights, or fewer so that all threads get some."""
    wanted = min(CHUNK_BYTES // bytes_each, outputs // (4 * threads))
    return max(wanted, 8, (outputs + MOST_CHUNKS - 2) // (MOST_CHUNKS - 1))


@part
def linear(team, thread, out, x, weight, residual, residual_out, stream):
    """out = d(x @ weight^T), or d(residual + that), of fp32 rows x [rows, columns]; residual_out keeps `stream`."""
    rows, outputs = len(x), len(weight)
    size = outputs_at_once(outputs, weight.shape[1] * weight.itemsize, team[THREADS])
    last = (outputs + size - 1) // size
    sums = np.empty((size, rows), np.float32)
    chunk = take(team, thread, last + 1)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)  # none in the last chunk, which is the stream
        products(sums, count, weight, first, x)
        if may_write(team, thread, chunk):
            if chunk == last:
                keep(residual_out, stream)
            for row in range(rows):
                for place in range(count):
                    if residual is None:
                        out[row, first + place] = narrow(sums[place, row], out)
                    else:
                        before = wide(residual[row, first + place], residual)
                        out[row, first + place] = narrow(before + rounded(sums[place, row], out), out)
            written(team, thread, chunk)
        chunk = take(team, thread, last + 1)


@part
def qkv_projection(team, thread, out, residual_out, x, norm_weight, weight, branch, branch_norm, eps):
    stream = residual_stream(x, branch, branch_norm, eps)
    linear(team, thread, out, normed(stream, norm_weight, eps, x), weight, None, residual_out, stream)


@part
def output_projection(team, thread, out, partial, weight, residual):
    """Of attention's splits `decode_attention` below fills the first alone."""
    linear(team, thread, out, partial[:, 0].copy(), weight, residual, None, None)


@part
def residual_linear(team, thread, out, x, weight, residual):
    linear(team, thread, out, widened(x), weight, residual, None, None)


@part
def gated_mlp(team, thread, out, residual_out, x, norm_weight, gate_up, branch, branch_norm, eps):
    stream = residual_stream(x, branch, branch_norm, eps)
    rows_in = normed(stream, norm_weight, eps, x)
    rows, outputs = out.shape
    size = outputs_at_once(outputs, 2 * gate_up.shape[1] * gate_up.itemsize, team[THREADS])
    last = (outputs + size - 1) // size
    gates, ups = np.empty((size, rows), np.float32), np.empty((size, rows), np.float32)
    chunk = take(team, thread, last + 1)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)  # none in the last chunk, which is the stream
        for place in range(count):  # in turn, so that both streams of weights flow
            products(gates[place:], 1, gate_up, first + place, rows_in)
            products(ups[place:], 1, gate_up, outputs + first + place, rows_in)
        for row in range(rows):
            for place in range(count):
                gate = rounded(gates[place, row], out)
                bent = np.float32(0.7978845608028654) * (gate + np.float32(0.044715) * gate * gate * gate)
                # gate / 2 * (1 + tanh(bent)), as 1 + tanh(y) = 2 / (1 + e^-2y)
                activated = gate / (np.float32(1.0) + exp(np.float32(-2.0) * bent))
                gates[place, row] = rounded(activated, out) * rounded(ups[place, row], out)
        if may_write(team, thread, chunk):
            if chunk == last:
                keep(residual_out, stream)
            for row in range(rows):
                for place in range(count):
                    out[row, first + place] = narrow(gates[place, row], out)
            written(team, thread, chunk)
        chunk = take(team, thread, last + 1)


@njit(inline="always")
def capped(value, softcap, like):
    """cap * tanh(value / cap), rounded after each operation."""
    value = rounded(value / softcap, like)
    value = rounded(np.float32(math.tanh(value)), like)
    return rounded(value * softcap, like)


@part
def lm_head_argmax(team, thread, token, x, norm_weight, table, branch, branch_norm, logits, eps, softcap):
    rows_in = normed(residual_stream(x, branch, branch_norm, eps), norm_weight, eps, x)
    rows, outputs = len(rows_in), len(table)
    size = outputs_at_once(outputs, table.shape[1] * table.itemsize, team[THREADS])
    chunks = (outputs + size - 1) // size
    sums = np.empty((size, rows), np.float32)
    best, best_ids = np.empty(rows, np.float32), np.empty(rows, np.int64)
    chunk = take(team, thread, chunks)
    while chunk >= 0:
        first = chunk * size
        count = min(size, outputs - first)
        products(sums, count, table, first, rows_in)
        for row in range(rows):
            best[row], best_ids[row] = -np.inf, first
            for place in range(count):
                # Rounded before the comparison: ties that Hugging Face sees must be ties here.
                logit = rounded(sums[place, row], x)
                if softcap is not None:
                    logit = capped(logit, softcap, x)
                sums[place, row] = logit
                # The lowest index of equal ones stays, and a NaN, to which nothing compares.
                if logit > best[row] or logit != logit:
                    best[row], best_ids[row] = logit, first + place
        if may_write(team, thread, chunk):
            for row in range(rows):
                note(team, chunk * rows + row, best[row], best_ids[row])
                if logits is not None:
                    for place in range(count):
                        logits[row, first + place] = narrow(sums[place, row], logits)
            written(team, thread, chunk)
        chunk = take(team, thread, chunks)
    while alone(team, thread):
        for row in range(rows):
            best[row], best_ids[row] = noted(team, row)
            for chunk in range(1, chunks):
                logit, index = noted(team, chunk * rows + row)
                if logit > best[row] or math.isnan(logit):
                    best[row], best_ids[row] = logit, index
            token[row] = best_ids[row] if math.isfinite(best[row]) else -1
        written(team, thread, 0)


@part
def turned_head(out, head, norm_weight, cos, sin, eps):
    """A query or key head [head_dim] after its norm (Gemma 3) and rotary embedding, in fp32."""
    for dim in range(len(head)):
        out[dim] = wide(head[dim], head)
    if norm_weight is not None:
        norm(out, out, norm_weight, eps, head)
    half = len(head) // 2
    for dim in range(half):
        low, high = out[dim], out[half + dim]
        c, s = wide(cos[dim], cos), wide(sin[dim], sin)
        out[dim] = rounded(rounded(low * c, head) - rounded(high * s, head), head)
        out[half + dim] = rounded(rounded(high * c, head) + rounded(low * s, head), head)


@part
def softmaxed(scores, softcap, scale, like):
    """Turns raw products into weights, in place; without a cap they are left to be divided by the sum returned."""
    highest = np.float32(-np.inf)
    for key in range(len(scores)):
        if softcap is None:
            scores[key] = scores[key] * scale
        else:  # eager attention rounds after every operation
            scores[key] = capped(rounded(rounded(scores[key], like) * scale, like), softcap, like)
        highest = max(highest, scores[key])
    total = np.float32(0.0)
    for key in range(len(scores)):
        scores[key] = exp(scores[key] - highest)
    for key in range(len(scores)):
        total += scores[key]
    for key in range(len(scores)):  # PyTorch's fused attention rounds before it divides
        scores[key] = rounded(scores[key] if softcap is None else scores[key] / total, like)
    return total if softcap is None else np.float32(1.0)


@part
def mixture(out, weights, values, slot, count, dim):
    """out += the sum over i < count, in this order, of weights[:, i] times values[(slot + i) % slots], for the block of
    columns that starts at `dim`.

    out [heads, head_dim] and weights [heads, at least count] are fp32, values [slots, head_dim] of the model's dtype.
    """
    slots, head_dim = values.shape
    start = 0
    while start < count:  # twice where the cache has wrapped around
        length = min(count - start, slots - slot)
        head = 0
        if head_dim - dim >= BLOCK:
            while len(out) - head >= 4:
                _mix(out, weights, start, values, slot, length, dim, head, 4)
                head += 4
            if len(out) - head >= 2:
                _mix(out, weights, start, values, slot, length, dim, head, 2)
                head += 2
            if len(out) > head:
                _mix(out, weights, start, values, slot, length, dim, head, 1)
        else:
            for key in range(length):
                for head in range(len(out)):
                    for column in range(dim, head_dim):
                        out[head, column] += weights[head, start + key] * wide(values[slot + key, column], values)
        start, slot = start + length, 0


@part
def decode_attention(
    team,
    thread,
    partial,
    stats,
    scratch,
    k_cache,
    v_cache,
    qkv,
    position,
    cos,
    sin,
    q_norm,
    k_norm,
    heads,
    window,
    scale,
    eps,
    softcap,
):
    kv_heads, slots, head_dim = k_cache.shape[1:]
    rows, groups, units = len(qkv), heads // kv_heads, len(qkv) * kv_heads
    scores, all_weights, totals = scratch[0], scratch[1], scratch[2]
    places = position.copy()  # others may be at a later step before this thread is through
    queries = np.empty((rows, heads, head_dim), np.float32)
    new_keys = np.empty((rows, kv_heads, 1, head_dim), k_cache.dtype)
    turned = np.empty(head_dim, np.float32)
    for row in range(rows):
        at, states = places[row], qkv[row].reshape(heads + 2 * kv_heads, head_dim)
        for head in range(heads):
            turned_head(queries[row, head], states[head], q_norm, cos[at], sin[at], eps)
        for kv_head in range(kv_heads):
            turned_head(turned, states[heads + kv_head], k_norm, cos[at], sin[at], eps)
            for dim in range(head_dim):
                new_keys[row, kv_head, 0, dim] = narrow(turned[dim], k_cache)

    # Over the keys, which all queries of a key head look at together. How many chunks there are may not depend on the
    # position, lest a late thread takes one that there is not.
    stretches = max(1, min(4 * team[THREADS], slots // 32, (MOST_CHUNKS - 1) // units))
    products_of_key, found = np.empty((1, groups), np.float32), np.empty((groups, slots // stretches + 1), np.float32)
    last = units * stretches
    chunk = take(team, thread, last + 1)
    while chunk >= 0:
        unit = min(chunk, last - 1) // stretches
        row, kv_head = unit // kv_heads, unit % kv_heads
        count = min(places[row] + 1, window)
        oldest = places[row] + 1 - count
        first, end = share(count, chunk % stretches, stretches)
        if chunk == last:  # the new key and value go into the cache
            end = first
        group = queries[row, kv_head * groups : (kv_head + 1) * groups]
        for key in range(first, end):
            if key == count - 1:
                products(products_of_key, 1, new_keys[row, kv_head], 0, group)
            else:
                products(products_of_key, 1, k_cache[row, kv_head], (oldest + key) % slots, group)
            for head in range(groups):
                found[head, key - first] = products_of_key[0, head]
        if may_write(team, thread, chunk):
            for head in range(groups):
                for key in range(first, end):
                    scores[row, kv_head * groups + head, key] = found[head, key - first]
            if chunk == last:
                for row in range(rows):
                    stats[row, :, 0], stats[row, :, 1] = -np.inf, np.float32(0.0)
                    stats[row, 0, 0], stats[row, 0, 1] = np.float32(0.0), np.float32(1.0)
                    states = qkv[row].reshape(heads + 2 * kv_heads, head_dim)
                    for kv_head in range(kv_heads):
                        for dim in range(head_dim):
                            k_cache[row, kv_head, places[row] % slots, dim] = new_keys[row, kv_head, 0, dim]
                            v_cache[row, kv_head, places[row] % slots, dim] = states[heads + kv_heads + kv_head, dim]
            written(team, thread, chunk)
        chunk = take(team, thread, last + 1)

    unit = take(team, thread, rows * heads)
    while unit >= 0:
        row, head = unit // heads, unit % heads
        count = min(places[row] + 1, window)
        weights = scores[row, head, :count].copy()
        total = softmaxed(weights, softcap, scale, qkv)
        if may_write(team, thread, unit):
            totals[row, head, 0] = total
            for key in range(count):
                all_weights[row, head, key] = weights[key]
            written(team, thread, unit)
        unit = take(team, thread, rows * heads)

    blocks = (head_dim + BLOCK - 1) // BLOCK
    mixed = np.empty((groups, head_dim), np.float32)
    unit = take(team, thread, units * blocks)
    while unit >= 0:  # over the values' columns, for all heads that share them
        row, kv_head, dim = unit // blocks // kv_heads, unit // blocks % kv_heads, unit % blocks * BLOCK
        count = min(places[row] + 1, window)
        mixed[:] = np.float32(0.0)
        mixture(
            mixed,
            all_weights[row, kv_head * groups : (kv_head + 1) * groups],
            v_cache[row, kv_head],
            (places[row] + 1 - count) % slots,
            count,
            dim,
        )
        if may_write(team, thread, unit):
            for place in range(groups):
                head = kv_head * groups + place
                for column in range(dim, min(dim + BLOCK, head_dim)):
                    result = rounded(mixed[place, column] / totals[row, head, 0], qkv)
                    partial[row, 0, head * head_dim + column] = result
            written(team, thread, unit)
        unit = take(team, thread, units * blocks)


@part
def advance(team, thread, token, x, position, done, emitted, step, table, stop_ids, embed_scale, pad):
    while alone(team, thread):
        for row in range(len(token)):
            if done[row]:
                token[row] = pad
            else:
                position[row] += 1
            done[row] |= token[row] < 0
            for stop in stop_ids:
                done[row] |= token[row] == stop
            emitted[step[0] % len(emitted), row] = token[row]
            for column in range(x.shape[1]):
                x[row, column] = narrow(wide(table[max(token[row], 0), column], table) * embed_scale, x)
        step[0] += 1
        written(team, thread, 0)

"""Atomic operations on a team's words, and what else its threads ask of LLVM and the system."""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils

from runtime.kernels.cpu.vectors import _INDEX, _INT, intrinsic


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
    """Runs a thread's part of compiled calls (team.py) by their address. Returns 0, or that a call failed."""

    def generate(context, builder, signature, arguments):
        words = context.make_array(signature.args[1])(context, builder, arguments[1]).data
        kind = ir.FunctionType(_INT, [words.type, _INDEX])
        status = builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [words, arguments[2]])
        return builder.sext(status, _INDEX)

    return types.int64(types.int64, team, types.int64), generate


sched_yield = types.ExternalFunction("sched_yield", types.int32())

"""Intrinsics for the threads of a team: atomic access to its words, pausing, and running a step's calls."""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils

from runtime.kernels.cpu.vectors import I32, I64, intrinsic


def _word(context, builder, signature, arguments):
    team = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(team.data, [context.cast(builder, arguments[1], signature.args[1], types.intp)])


@intrinsic
def atomic_load(typing_context, team, index):
    """team[index], sequentially consistent."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_word(context, builder, signature, arguments), "seq_cst", 8)

    return types.int64(team, index), generate


@intrinsic
def atomic_store(typing_context, team, index, value):
    """team[index] = value, sequentially consistent."""

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[2], signature.args[2], types.int64)
        builder.store_atomic(value, _word(context, builder, signature, arguments), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(team, index, value), generate


@intrinsic
def compare_and_swap(typing_context, team, index, old, new):
    """Sets team[index] to `new` if it is `old`; returns whether it was."""

    def generate(context, builder, signature, arguments):
        old, new = (context.cast(builder, arguments[i], signature.args[i], types.int64) for i in (2, 3))
        word = _word(context, builder, signature, arguments)
        return builder.extract_value(builder.cmpxchg(word, old, new, "seq_cst", "seq_cst"), 1)

    return types.boolean(team, index, old, new), generate


@intrinsic
def pause(typing_context):
    """The processor's hint for spin loops."""

    def generate(context, builder, signature, arguments):
        if platform.machine() == "x86_64":
            hint = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, hint, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def load_word(typing_context, address, index):
    """The int64 at position `index`, counted from an address."""

    def generate(context, builder, signature, arguments):
        words = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load(builder.gep(words, [context.cast(builder, arguments[1], signature.args[1], types.int64)]))

    return types.int64(types.int64, index), generate


@intrinsic
def call_thunk(typing_context, thunk, team, thread, words):
    """Runs a thread's part of a call, given the addresses of a thunk (team.py) and of its words. Returns 0, or 1 if the
    call failed."""

    def generate(context, builder, signature, arguments):
        team = context.make_array(signature.args[1])(context, builder, arguments[1]).data
        kind = ir.FunctionType(I32, [team.type, I64, I64.as_pointer()])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        status = builder.call(function, [team, arguments[2], builder.inttoptr(arguments[3], I64.as_pointer())])
        return builder.zext(builder.icmp_signed("!=", status, I32(0)), I64)

    return types.int64(types.int64, team, types.int64, types.int64), generate


sched_yield = types.ExternalFunction("sched_yield", types.int32())

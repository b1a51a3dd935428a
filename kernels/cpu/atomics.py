"""Intrinsics for the threads of a team: atomic access to its words, pausing, and running a compiled step."""

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
def run_code(typing_context, code, team, thread):
    """Runs a thread's part of a step's machine code, given its address (team.py). Returns 0, or 1 if a call failed."""

    def generate(context, builder, signature, arguments):
        words = context.make_array(signature.args[1])(context, builder, arguments[1]).data
        kind = ir.FunctionType(I32, [words.type, I64])
        status = builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [words, arguments[2]])
        return builder.sext(status, I64)

    return types.int64(types.int64, team, types.int64), generate


sched_yield = types.ExternalFunction("sched_yield", types.int32())

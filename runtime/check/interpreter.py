"""Triton's interpreter as a check of kernels needs it: bf16 that rounds as a GPU does, and every address checked.

The interpreter keeps bf16 as uint16. As it comes it cuts fp32 down to bf16 instead of rounding, and multiplies, adds,
compares and `dot`s bf16 values as integers. It reads and writes whatever address a kernel makes, and gives zeros where
a load is masked without saying what stands there, which on a GPU may be anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle

Patched = Callable[[Any, str, Any], None]  # replaces an attribute of an object


@contextmanager
def checked_interpreter() -> Iterator[None]:
    """In a `with` block, the interpreter with its bf16 mended and every address checked."""
    with ExitStack() as stack:

        def patched(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        repair_bf16(patched)
        check_memory(patched)
        patch_language_once(patched)
        leave_overflow_unchecked(patched)
        keep_types(patched)
        leave_equal_types(patched)
        # Lanes that a mask leaves out compute what they will, on a GPU without a word.
        stack.enter_context(np.errstate(all="ignore"))
        yield


def widened(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """The bf16 bits of fp32 values: to nearest, halves to even, NaN kept."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)  # room for the carry
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def is_bf16(handle: TensorHandle) -> bool:
    # A comparison's result keeps its operands' dtype beside data of bool.
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def wide(handle: TensorHandle) -> TensorHandle:
    """The handle with bf16 widened to fp32, any other as it is."""
    return TensorHandle(widened(handle.data), tl.float32) if is_bf16(handle) else handle


def repair_bf16(patched: Patched) -> None:
    """Makes casts, dots, arithmetic and comparisons on bf16 what they are on a GPU: computed in fp32, then rounded.
    Dots of every dtype add up in fp64."""
    stock = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "binary_op", "unary_op")}
    stock_sum = ReduceOps.sum

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == dst_type.scalar or tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return stock["cast_impl"](self, src, dst_type)
        if dst_type.scalar != tl.bfloat16:
            return stock["cast_impl"](self, wide(src), dst_type)
        if src.dtype.scalar == tl.float64:
            raise TypeError("fp64 to bf16 would round twice: cast to fp32 first")
        return TensorHandle(rounded(src.data), tl.bfloat16)

    def create_dot(self, a, b, d, *options):
        # In fp64: BLAS adds up in another order for another number of rows, which a tensor core does not. What that
        # does to the last bits is rounded away.
        first, second = (wide(operand).data.astype(np.float64) for operand in (a, b))
        return TensorHandle((d.data + first @ second).astype(d.data.dtype), d.dtype.scalar)

    def binary_op(self, lhs, rhs, op):
        if not is_bf16(lhs):
            return stock["binary_op"](self, lhs, rhs, op)
        result = op(widened(lhs.data), widened(rhs.data))
        return TensorHandle(result if result.dtype == np.bool_ else rounded(result), tl.bfloat16)

    def unary_op(self, arg, op):
        if not is_bf16(arg):
            return stock["unary_op"](self, arg, op)
        return TensorHandle(rounded(op(widened(arg.data))), tl.bfloat16)

    def reduced_sum(self, input):
        if input.dtype == tl.bfloat16:
            raise TypeError("a sum of bf16 rounds in an order that is not ours to say: widen it to fp32 first")
        return stock_sum(self, input)

    for repaired in (cast_impl, create_dot, binary_op, unary_op):
        patched(InterpreterBuilder, repaired.__name__, repaired)
    patched(ReduceOps, "sum", reduced_sum)


class OutOfBounds(Exception):
    """A kernel touched an address outside the tensors that it was given."""


class CheckedMemory:
    """Stands between the interpreter and memory: what a kernel touches has to lie inside one argument of its launch.

    Args:
        memory: the interpreter's native module, whose four ways to memory all of Triton's operations end in.
    """

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._kernel = "no kernel"
        self._arguments: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def launched(self, kernel: str, arguments: dict[str, Any]) -> None:
        """Takes note of a launch. Of a view only the view's own elements may be touched, not the rest of its base."""
        self._kernel, self._arguments = kernel, []
        for name, value in arguments.items():
            if not isinstance(value, torch.Tensor):
                continue
            if not value.is_contiguous():
                raise ValueError(f"{kernel}: {name} is not contiguous, so its bounds say little")
            start = value.data_ptr()
            self._arguments.append((name, start, start + value.numel() * value.element_size()))

    def _check(self, what: str, addresses: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        touched = addresses if mask is None else addresses[np.broadcast_to(mask, addresses.shape)]
        if not touched.size:
            return
        first, end = int(touched.min()), int(touched.max()) + size
        # One operation goes to one tensor, so an overrun into another argument is none the better.
        if any(start <= first and end <= stop for _, start, stop in self._arguments):
            return

        def outside(argument: tuple[str, int, int]) -> int:
            """By how many bytes the operation leaves this argument."""
            return max(argument[1] - first, end - argument[2])

        if not self._arguments:
            raise OutOfBounds(f"{self._kernel}: {what} at {first:#x}, and no argument is a tensor")
        name, start, stop = min(self._arguments, key=outside)
        where = f"{end - stop} bytes past the end" if end > stop else f"{start - first} bytes before the start"
        raise OutOfBounds(f"{self._kernel}: {what} {where} of {name}, the nearest argument ({stop - start} bytes)")

    def load(self, addresses, mask, other, dtype):
        self._check("load", addresses, mask, dtype.itemsize)
        return self._memory.load(addresses, mask, other, dtype)

    def store(self, addresses, value, mask):
        self._check("store", addresses, mask, value.itemsize)
        return self._memory.store(addresses, value, mask)

    def atomic_rmw(self, op, addresses, value, mask, sem):
        self._check("atomic", addresses, mask, value.itemsize)
        return self._memory.atomic_rmw(op, addresses, value, mask, sem)

    def atomic_cas(self, addresses, expected, value, sem):
        self._check("atomic", addresses, None, value.itemsize)
        return self._memory.atomic_cas(addresses, expected, value, sem)


def garbage(shape: tuple[int, ...], dtype: tl.dtype) -> np.ndarray:
    """What a masked lane may hold where a load names no `other`: NaN, or a large integer."""
    array = np.empty(shape, interpreter._get_np_dtype(dtype))
    array.fill(0x7FC0 if dtype == tl.bfloat16 else np.nan if array.dtype.kind == "f" else 0x55)
    return array


def check_memory(patched: Patched) -> None:
    """Makes every launch refuse addresses outside its arguments, and fills masked lanes without a value."""
    memory = CheckedMemory(interpreter._interpreter)
    stock_arguments, stock_load = GridExecutor._init_args_hst, InterpreterBuilder.create_masked_load

    def _init_args_hst(self, args_dev, kwargs):
        # On a CPU the host's arguments share the given tensors' storage.
        args, named = stock_arguments(self, args_dev, kwargs)
        memory.launched(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | named)
        return args, named

    def create_masked_load(self, addresses, mask, other, *options, **named):
        # Triton asks a one-element `other` for its truth, so that a zero arrives here as none.
        if other is None and addresses.data.size > 1:
            dtype = addresses.get_element_ty()
            other = TensorHandle(garbage(addresses.data.shape, dtype), dtype)
        return stock_load(self, addresses, mask, other, *options, **named)

    patched(interpreter, "_interpreter", memory)
    patched(GridExecutor, "_init_args_hst", _init_args_hst)
    patched(InterpreterBuilder, "create_masked_load", create_masked_load)


def patch_language_once(patched: Patched) -> None:
    """Spares the interpreter wrapping the language anew in every call of a device function: a third of its time."""

    @functools.cache
    def languages(fn):
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def call(self, *args, **kwargs):
        if any(tl.core.is_builtin(language.load) for language in languages(self.fn)):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    patched(InterpretedFunction, "__call__", call)


def leave_overflow_unchecked(patched: Patched) -> None:
    """Spares the interpreter computing whether each sum and product of integers overflows, which it then tells nobody:
    half its time."""
    builder = interpreter.interpreter_builder
    patched(builder, "options", replace(builder.options, sanitize_overflow=False))


def keep_types(patched: Patched) -> None:
    """Spares the interpreter making the type and shape of every value anew, of which kernels have a few dozen: a third
    of its time. A type's name says all that there is to it, and nothing changes one."""
    stock_block, stock_tensor, stock_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    tensors: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, np.dtype[Any]] = {}

    def init_block(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in blocks:
            stock_block(self, element_ty, shape)
            self.shape = shapes.setdefault(tuple(self.shape), self.shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def init_tensor(self, handle, type):
        if type.name not in tensors:
            stock_tensor(self, handle, type)
            tensors[type.name] = {name: value for name, value in self.__dict__.items() if name != "handle"}
        self.handle = handle
        self.__dict__.update(tensors[type.name])

    def np_dtype(type):
        if type.name not in dtypes:
            dtypes[type.name] = stock_dtype(type)
        return dtypes[type.name]

    patched(tl.block_type, "__init__", init_block)
    patched(tl.tensor, "__init__", init_tensor)
    patched(interpreter, "_get_np_dtype", np_dtype)


def leave_equal_types(patched: Patched) -> None:
    """Spares the interpreter finding out that there is nothing to unwrap, cast or broadcast, as with most operands: an
    eighth of its time. `keep_types` makes equal shapes one object."""
    stock_unwrap, stock_equal = tl.core._unwrap_if_constexpr, tl.dtype.__eq__
    stock_checking, stock_broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    unwrapped = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, bool, int, float, str, type(None)}
    # Of two of one of these every operation computes in it; halves are widened where they are divided.
    kept = {*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, "fp32", "fp64"}

    def unwrap(value):
        return value if type(value) in unwrapped else stock_unwrap(value)

    def equal(self, other):
        return self is other or stock_equal(self, other)

    def have_equal_shapes(lhs, rhs):
        return lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape

    def type_checking(self, lhs, rhs, *options, **named):
        if type(lhs) is tl.tensor and type(rhs) is tl.tensor and have_equal_shapes(lhs, rhs):
            if lhs.type.element_ty.name == rhs.type.element_ty.name in kept:
                return lhs, rhs
        return stock_checking(self, lhs, rhs, *options, **named)

    def broadcast(self, lhs, rhs):
        return (lhs, rhs) if have_equal_shapes(lhs, rhs) else stock_broadcast(self, lhs, rhs)

    patched(tl.core, "_unwrap_if_constexpr", unwrap)
    patched(tl.dtype, "__eq__", equal)
    patched(TritonSemantic, "binary_op_type_checking_impl", type_checking)
    patched(TritonSemantic, "broadcast_impl_value", broadcast)

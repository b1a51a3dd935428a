"""The backends that a step can run on: each offers every operation as a method, with that operation's own arguments.

    ops = ops_for(device)
    ops.qkv_projection(out, x, norm_weight, weight, eps=1e-6)

A step is written once; the backend that it is given decides which form of each operation runs. NumbaOps, which captures
compiled kernels on a CPU, is in cpu/calls.py.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import torch

from runtime.kernels.advance import Advance
from runtime.kernels.argmax import LmHeadArgmax
from runtime.kernels.chunk_attention import ChunkAttention
from runtime.kernels.decode_attention import DecodeAttention
from runtime.kernels.dequantize import Dequantize
from runtime.kernels.gated_mlp import GatedMlp
from runtime.kernels.gated_product import GatedProduct
from runtime.kernels.launch import INTERPRETING, Gpu, Launch, Launcher, Recorder, gpu_of
from runtime.kernels.operation import Operation
from runtime.kernels.qkv_projection import QkvProjection
from runtime.kernels.residual_linear import ResidualLinear
from runtime.kernels.rms_norm import ResidualNorm, RmsNorm
from runtime.kernels.rotate_heads import RotateHeads
from runtime.kernels.sequence_attention import SequenceAttention
from runtime.kernels.store_chunk import StoreChunk
from runtime.kernels.store_keys import StoreKeys

P = ParamSpec("P")


def _described(function: Any, operation_class: Any, *, is_method: bool) -> Any:
    """Gives a function the name, the documentation and (after a method's `ops`) the signature of an operation."""
    name = operation_class.name
    function.__name__, function.__qualname__ = name, f"Ops.{name}" if is_method else name
    function.__doc__ = operation_class.__doc__
    ops = [inspect.Parameter("ops", inspect.Parameter.POSITIONAL_ONLY)] if is_method else []
    function.__signature__ = inspect.Signature([*ops, *inspect.signature(operation_class).parameters.values()])
    function.__annotations__ = {}
    return function


def _method(operation_class: Callable[P, Operation]) -> Callable[Concatenate[Ops, P], None]:
    """The method of a backend that makes, checks and runs an operation."""

    def method(ops: Ops, *arguments: P.args, **options: P.kwargs) -> None:
        operation = operation_class(*arguments, **options)
        operation.check()
        ops.run(operation)

    return _described(method, operation_class, is_method=True)


class Ops(ABC):
    """A backend. Each method checks its arguments before anything runs: see the operation's class."""

    @abstractmethod
    def run(self, operation: Operation) -> None:
        """Runs an operation whose arguments are checked."""

    qkv_projection = _method(QkvProjection)
    decode_attention = _method(DecodeAttention)
    sequence_attention = _method(SequenceAttention)
    store_keys = _method(StoreKeys)
    gated_mlp = _method(GatedMlp)
    residual_linear = _method(ResidualLinear)
    lm_head_argmax = _method(LmHeadArgmax)
    advance = _method(Advance)
    rms_norm = _method(RmsNorm)

    # For a chunk of a prompt on a GPU, between a library's products.
    residual_norm = _method(ResidualNorm)
    rotate_heads = _method(RotateHeads)
    chunk_attention = _method(ChunkAttention)
    store_chunk = _method(StoreChunk)
    gated_product = _method(GatedProduct)
    dequantize = _method(Dequantize)


class TorchOps(Ops):
    """Plain PyTorch, on any device."""

    def run(self, operation: Operation) -> None:
        operation.run_torch()


class TritonOps(Ops):
    """Triton kernels, on tensors of one GPU, or in the interpreter.

    Args:
        gpu: selects block shapes; None in the interpreter.
        max_rows: the most rows that operations will have; None where that is not known (see Launcher).
    """

    def __init__(self, gpu: Gpu | None, max_rows: int | None = None) -> None:
        self._launch = Launcher(gpu, max_rows)

    def run(self, operation: Operation) -> None:
        operation.run_triton(self._launch)


class RecordingOps(Ops):
    """Records what TritonOps would launch on `gpu`, for tensors on the device "meta"; nothing runs."""

    def __init__(self, gpu: Gpu, max_rows: int | None = None) -> None:
        self._recorder = Recorder(gpu, max_rows)

    @property
    def launches(self) -> list[Launch]:
        """All launches so far, in order."""
        return self._recorder.launches

    def run(self, operation: Operation) -> None:
        operation.run_triton(self._recorder)


def ops_for(device: torch.device, max_rows: int | None = None) -> Ops:
    """The backend for tensors on a device: Triton on a GPU or under TRITON_INTERPRET=1, else plain PyTorch. `max_rows`
    is as in TritonOps."""
    return TritonOps(gpu_of(device), max_rows) if device.type == "cuda" or INTERPRETING else TorchOps()


def _function(operation_class: Callable[P, Operation]) -> Callable[P, None]:
    """An operation as a function, on the backend for its tensors."""

    def function(*arguments: P.args, **options: P.kwargs) -> None:
        operation = operation_class(*arguments, **options)
        operation.check()
        ops_for(operation.device).run(operation)

    return _described(function, operation_class, is_method=False)


qkv_projection = _function(QkvProjection)
decode_attention = _function(DecodeAttention)
sequence_attention = _function(SequenceAttention)
store_keys = _function(StoreKeys)
gated_mlp = _function(GatedMlp)
residual_linear = _function(ResidualLinear)
lm_head_argmax = _function(LmHeadArgmax)
advance = _function(Advance)
rms_norm = _function(RmsNorm)

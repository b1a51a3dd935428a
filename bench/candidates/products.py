"""Candidate forms of a decode step's matrix products, compiled, checked and timed on the GPU at hand.

    python -m runtime.bench.candidates.products --out FILE [--models a,b] [--minutes M] [--compile-only]

    held   K cut over the warps of a 3-D dot; the weights are in registers before the wait, rows are normed inside
    loop   K cut over the warps, in a pipelined loop behind the wait, over rows that another launch has normed
    held4  2-D dots of weights that are held, in which every warp repeats the whole product
    sum    one row only: products and sums in fp32, columns in powers of two; with "packed", one warp a program
           and bf16 pairs as int32
    today  the project's own kernels

All weights are bf16 [outputs, width], gate rows before up rows; sums are fp32. A dot's rows are padded to N and those
that are missing are masked, so one binary serves every number of rows.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from runtime.bench.compiled import GPUS, Reads, inspect
from runtime.bench.timing import time_us
from runtime.bench.tune import WEIGHT_BYTES, Case, cases, operation
from runtime.cost.bandwidth import read_bandwidth_gb_s
from runtime.cost.machine_code import source
from runtime.kernels.gated_mlp import gelu_tanh
from runtime.kernels.launch import (
    IN_INTERPRETER,
    Gpu,
    Launcher,
    Recorder,
    gpu_of,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from runtime.kernels.matvec import held_packed
from runtime.kernels.ops import RecordingOps, ops_for
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED

MODELS = ("gemma-1.1-2b", "gemma-2-2b", "gemma-3-1b", "gemma-3-270m")
MANY_ROWS_MODELS = ("gemma-1.1-2b", "gemma-3-1b")  # timed at 16 to 64 rows too
NAMES = {"output_projection": "output", "residual_linear": "down", "lm_head_argmax": "lm_head"}
MAX_ROWS, EPS, TOLERANCE = 64, 1e-6, 1e-2
MAX_LAUNCHES, TIMED_BYTES = 100, 8e9  # in one timed graph
SHARED_BYTES = 227 * 1024  # of one program on sm_90
DTYPE = torch.bfloat16


@triton.jit
def weight_rows(program, outputs, BLOCK_OUTPUTS: tl.constexpr, IS_GATED: tl.constexpr):
    """The weight rows of a program's tile: of a gated product half a tile of gate rows, then the matching up rows."""
    i = tl.arange(0, BLOCK_OUTPUTS).to(tl.int64)
    if IS_GATED:
        HALF: tl.constexpr = BLOCK_OUTPUTS // 2
        return program * HALF + i % HALF + (i // HALF) * outputs
    else:
        return program * BLOCK_OUTPUTS + i


@triton.jit
def store_products(out_ptr, products, program, rows, outputs, BLOCK_OUTPUTS: tl.constexpr, IS_GATED: tl.constexpr):
    """Stores the products [BLOCK_OUTPUTS, N] of a tile, after the activation where they are gated."""
    N: tl.constexpr = products.shape[1]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.arange(0, N)
    if IS_GATED:
        HALF: tl.constexpr = BLOCK_OUTPUTS // 2
        gate, up = tl.split(tl.permute(tl.reshape(products, (2, HALF, N)), (1, 2, 0)))
        gate = gelu_tanh(gate.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        o = program * HALF + tl.arange(0, HALF)
        at = out_ptr + n[None, :] * outputs + o[:, None]
        tl.store(at, (gate * up.to(dtype).to(tl.float32)).to(dtype), mask=(n < rows)[None, :])
    else:
        o = program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
        tl.store(out_ptr + n[None, :] * outputs + o[:, None], products.to(dtype), mask=(n < rows)[None, :])


@triton.jit
def dot(weight, x, sums):
    """The sums and the product of two tiles. The interpreter multiplies bf16 as integers, so it is given fp32."""
    if IN_INTERPRETER:
        return tl.dot(weight.to(tl.float32), x.to(tl.float32), sums)
    else:
        return tl.dot(weight, x, sums)


@triton.jit
def mean_square(pieces, WIDTH: tl.constexpr):
    """The mean squares [N] of rows whose columns are in tiles [SLICES, N, columns]."""
    squares = pieces[0] * pieces[0]
    for i in tl.static_range(1, len(pieces)):
        squares += pieces[i] * pieces[i]
    return tl.sum(tl.sum(squares, axis=2), axis=0) / WIDTH


@triton.jit
def sliced_columns(START: tl.constexpr, PIECE: tl.constexpr, SLICES: tl.constexpr):
    """The columns of the piece that begins at START, as [SLICES, 1, PIECE / SLICES]."""
    SIZE: tl.constexpr = PIECE // SLICES
    return START + tl.arange(0, SLICES)[:, None, None] * SIZE + tl.arange(0, SIZE)[None, None, :]


@triton.jit(do_not_specialize=["rows", "outputs"])
def held_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    branch_ptr,
    branch_norm_ptr,
    rows,
    outputs,
    eps,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_PINNED: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    SLICES: tl.constexpr,
    N: tl.constexpr,
):
    # One program holds BLOCK_OUTPUTS whole weight rows and multiplies N rows by them. Slices of the columns are summed
    # by different warps, if there are as many warps.
    program = tl.program_id(0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.arange(0, N)[None, :, None]
    row, here = n * WIDTH, n < rows
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    at = weight_ptr + weight_rows(program, outputs, BLOCK_OUTPUTS, IS_GATED)[None, :, None] * WIDTH
    weight, x, branch, gain, branch_gain = (), (), (), (), ()
    for START in tl.static_range(0, WIDTH, PIECE):
        k = sliced_columns(START, PIECE, SLICES)
        weight += (tl.load(at + k, eviction_policy="evict_first"),)  # [SLICES, BLOCK_OUTPUTS, PIECE / SLICES]
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for START in tl.static_range(0, WIDTH, PIECE):
        k = sliced_columns(START, PIECE, SLICES)
        # Norm weights are loaded for each row, in the layout of the rows: nothing has to be converted.
        of_each = tl.broadcast_to(k, (SLICES, N, k.shape[2]))
        x += (tl.load(x_ptr + row + k, mask=here, other=0.0),)  # [SLICES, N, PIECE / SLICES]
        if HAS_BRANCH:
            branch += (tl.load(branch_ptr + row + k, mask=here, other=0.0).to(tl.float32),)
            branch_gain += (1.0 + tl.load(branch_norm_ptr + of_each).to(tl.float32),)
        if HAS_NORM:
            gain += (1.0 + tl.load(norm_weight_ptr + of_each).to(tl.float32),)
    if HAS_BRANCH:
        inverse = tl.rsqrt(mean_square(branch, WIDTH) + eps)
        residual = ()
        for i in tl.static_range(len(x)):
            normed = (branch[i] * inverse[None, :, None] * branch_gain[i]).to(dtype).to(tl.float32)
            residual += ((x[i].to(tl.float32) + normed).to(dtype),)
        x = residual
        stored = tl.where(program == 0, rows, 0)
        for i in tl.static_range(len(x)):
            k = sliced_columns(i * PIECE, PIECE, SLICES)
            tl.store(residual_out_ptr + row + k, x[i], mask=n < stored)
    if HAS_NORM:
        wide = ()
        for i in tl.static_range(len(x)):
            wide += (x[i].to(tl.float32),)
        inverse = tl.rsqrt(mean_square(wide, WIDTH) + eps)
        x = ()
        for i in tl.static_range(len(wide)):
            # Opaque to the compiler, which would otherwise move the norm into the layout of the dot.
            x += (held_packed((wide[i] * inverse[None, :, None] * gain[i]).to(dtype)),)
    if IS_PINNED:
        pinned = ()
        for i in tl.static_range(len(weight)):
            pinned += (held_packed(weight[i]),)
        weight = pinned
    sums = tl.zeros([SLICES, BLOCK_OUTPUTS, N], tl.float32)
    for i in tl.static_range(len(x)):
        sums = dot(weight[i], tl.trans(x[i], 0, 2, 1), sums)
    store_products(out_ptr, tl.sum(sums, axis=0), program, rows, outputs, BLOCK_OUTPUTS, IS_GATED)


@triton.jit(do_not_specialize=["rows", "outputs"])
def loop_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    rows,
    outputs,
    WIDTH: tl.constexpr,
    IS_GATED: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    N: tl.constexpr,
):
    # One program multiplies N rows by BLOCK_OUTPUTS weight rows, SLICES * BLOCK_WIDTH columns at a time.
    program = tl.program_id(0)
    s, n, k = tl.arange(0, SLICES), tl.arange(0, N), tl.arange(0, BLOCK_WIDTH)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    STEP: tl.constexpr = SLICES * BLOCK_WIDTH
    w_row = weight_rows(program, outputs, BLOCK_OUTPUTS, IS_GATED)[None, :, None] * WIDTH
    w_column = s[:, None, None] * BLOCK_WIDTH + k[None, None, :]
    x_column = s[:, None, None] * BLOCK_WIDTH + k[None, :, None]
    here = (n < rows)[None, None, :]
    sums = tl.zeros([SLICES, BLOCK_OUTPUTS, N], tl.float32)
    for start in tl.range(0, WIDTH, STEP, num_stages=STAGES):
        at, x_at = weight_ptr + w_row + w_column + start, x_ptr + n[None, None, :] * WIDTH + x_column + start
        if WIDTH % STEP == 0:
            weight = tl.load(at, eviction_policy="evict_first")
            x = tl.load(x_at, mask=here, other=0.0)
        else:
            weight = tl.load(at, mask=w_column + start < WIDTH, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_at, mask=here & (x_column + start < WIDTH), other=0.0)
        sums = dot(weight, x, sums)
    store_products(out_ptr, tl.sum(sums, axis=0), program, rows, outputs, BLOCK_OUTPUTS, IS_GATED)


@triton.jit(do_not_specialize=["rows", "outputs"])
def held4_kernel(
    out_ptr,
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    rows,
    outputs,
    eps,
    WIDTH: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    N: tl.constexpr,
):
    # One program holds BLOCK_OUTPUTS whole weight rows in pieces of PIECE columns and multiplies N rows by them.
    program = tl.program_id(0)
    n = tl.arange(0, N)
    here = (n < rows)[:, None]
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    at = weight_ptr + weight_rows(program, outputs, BLOCK_OUTPUTS, False)[:, None] * WIDTH
    weight = ()
    for START in tl.static_range(0, WIDTH, PIECE):
        k = START + tl.arange(0, min(PIECE, WIDTH - START))
        weight += (tl.load(at + k[None, :], eviction_policy="evict_first"),)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    squares = tl.zeros([N], tl.float32)
    for START in tl.static_range(0, WIDTH, PIECE):
        k = START + tl.arange(0, min(PIECE, WIDTH - START))
        x = tl.load(x_ptr + n[:, None] * WIDTH + k[None, :], mask=here, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    inverse = tl.rsqrt(squares / WIDTH + eps)[:, None]
    sums = tl.zeros([BLOCK_OUTPUTS, N], tl.float32)
    for i in tl.static_range(len(weight)):
        k = i * PIECE + tl.arange(0, min(PIECE, WIDTH - i * PIECE))
        x = tl.load(x_ptr + n[:, None] * WIDTH + k[None, :], mask=here, other=0.0).to(tl.float32)
        x = x * inverse * (1.0 + tl.load(norm_weight_ptr + k).to(tl.float32))[None, :]
        sums = dot(weight[i], tl.trans(x.to(weight_ptr.dtype.element_ty)), sums)
    store_products(out_ptr, sums, program, rows, outputs, BLOCK_OUTPUTS, False)


@triton.jit
def sum_of(pieces):
    """The sum over the last axis of all pieces; those that have the shape of the first share one reduction."""
    total = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        if pieces[i].shape == pieces[0].shape:
            total += pieces[i]
    total = tl.sum(total, axis=len(pieces[0].shape) - 1)
    for i in tl.static_range(1, len(pieces)):
        if pieces[i].shape != pieces[0].shape:
            total += tl.sum(pieces[i], axis=len(pieces[0].shape) - 1)
    return total


@triton.jit
def normed_pieces(pieces, norm_weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """The norm of one row in pieces, fp32 in and out, rounded to the model's dtype."""
    squares, normed = (), ()
    for i in tl.static_range(len(pieces)):
        squares += (pieces[i] * pieces[i],)
    inverse = tl.rsqrt(sum_of(squares) / WIDTH + eps)
    for i in tl.static_range(len(pieces)):
        normed += ((pieces[i] * inverse * (1.0 + norm_weight[i].to(tl.float32))).to(dtype).to(tl.float32),)
    return normed


@triton.jit
def sum_of_products(weight, x):
    """The products [BLOCK_OUTPUTS] of weights and a row, both in pieces."""
    products = ()
    for i in tl.static_range(len(x)):
        products += (weight[i].to(tl.float32) * x[i][None, :],)
    return sum_of(products)


@triton.jit(do_not_specialize=["rows", "outputs"])
def sum_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    branch_ptr,
    branch_norm_ptr,
    rows,
    outputs,
    eps,
    WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    IS_GATED: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    # One program multiplies the only row by BLOCK_OUTPUTS weight rows, and the matching up rows where it is gated.
    program = tl.program_id(0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    o = program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    at = weight_ptr + o.to(tl.int64)[:, None] * WIDTH
    up_at = at + outputs.to(tl.int64) * WIDTH
    weight, up_weight, norm_weight, branch_norm, x, branch = (), (), (), (), (), ()
    for START in tl.static_range(0, WIDTH, PIECE):
        k = START + tl.arange(0, min(PIECE, WIDTH - START))
        weight += (tl.load(at + k[None, :], eviction_policy="evict_first"),)
        if IS_GATED:
            up_weight += (tl.load(up_at + k[None, :], eviction_policy="evict_first"),)
        norm_weight += (tl.load(norm_weight_ptr + k),)
        if HAS_BRANCH:
            branch_norm += (tl.load(branch_norm_ptr + k),)
    stored = tl.where(program == 0, WIDTH, 0)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for START in tl.static_range(0, WIDTH, PIECE):
        k = START + tl.arange(0, min(PIECE, WIDTH - START))
        x += (tl.load(x_ptr + k).to(tl.float32),)
        if HAS_BRANCH:
            branch += (tl.load(branch_ptr + k).to(tl.float32),)
    if HAS_BRANCH:
        normed = normed_pieces(branch, branch_norm, eps, WIDTH, dtype)
        residual = ()
        for i in tl.static_range(len(x)):
            k = i * PIECE + tl.arange(0, min(PIECE, WIDTH - i * PIECE))
            new = (x[i] + normed[i]).to(dtype)
            tl.store(residual_out_ptr + k, new, mask=k < stored)
            residual += (new.to(tl.float32),)
        x = residual
    x = normed_pieces(x, norm_weight, eps, WIDTH, dtype)
    y = sum_of_products(weight, x)
    if IS_GATED:
        gate = gelu_tanh(y.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        y = gate * sum_of_products(up_weight, x).to(dtype).to(tl.float32)
    tl.store(out_ptr + o, y.to(dtype))


@triton.jit
def low(pair):
    """The first of two bf16 values in an int32, in fp32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(pair):
    """The second of two bf16 values in an int32, in fp32."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded_pair(first, second):
    """Two fp32 values rounded to bf16, in an int32."""
    if IN_INTERPRETER:
        first, second = first.to(tl.bfloat16).to(tl.float32), second.to(tl.bfloat16).to(tl.float32)
        return (first.to(tl.int32, bitcast=True) >> 16) & 65535 | second.to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], tl.int32, is_pure=True, pack=1
        )


@triton.jit
def normed_pairs(pairs, norm_weight, eps, WIDTH: tl.constexpr):
    """The norm of one row of bf16 pairs, in pieces."""
    squares = low(pairs[0]) * low(pairs[0]) + high(pairs[0]) * high(pairs[0])
    for i in tl.static_range(1, len(pairs)):
        squares += low(pairs[i]) * low(pairs[i]) + high(pairs[i]) * high(pairs[i])
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)
    normed = ()
    for i in tl.static_range(len(pairs)):
        first = low(pairs[i]) * inverse * (1.0 + low(norm_weight[i]))
        normed += (rounded_pair(first, high(pairs[i]) * inverse * (1.0 + high(norm_weight[i]))),)
    return normed


@triton.jit
def products_of_pairs(weight, x, PIECES: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr):
    """The products [BLOCK_OUTPUTS] of weight rows and a row of bf16 pairs, both in pieces."""
    y = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    for o in tl.static_range(BLOCK_OUTPUTS):
        total = low(weight[o * PIECES]) * low(x[0]) + high(weight[o * PIECES]) * high(x[0])
        for i in tl.static_range(1, PIECES):
            total += low(weight[o * PIECES + i]) * low(x[i]) + high(weight[o * PIECES + i]) * high(x[i])
        y = tl.where(tl.arange(0, BLOCK_OUTPUTS) == o, tl.sum(total, axis=0), y)
    return y


@triton.jit(do_not_specialize=["rows", "outputs"])
def packed_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    branch_ptr,
    branch_norm_ptr,
    rows,
    outputs,
    eps,
    WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    IS_GATED: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    # One warp multiplies the only row by BLOCK_OUTPUTS weight rows, and the matching up rows where it is gated. All
    # pointers but out_ptr are to bf16 pairs. Every piece has the same layout, so nothing goes through shared memory.
    program = tl.program_id(0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    WORDS: tl.constexpr = WIDTH // 2
    k = tl.arange(0, PIECE // 2)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    at = weight_ptr + (program * BLOCK_OUTPUTS).to(tl.int64) * WORDS
    up_at = at + outputs.to(tl.int64) * WORDS
    weight, up_weight, norm_weight, branch_norm, x, branch = (), (), (), (), (), ()
    for start in tl.static_range(0, BLOCK_OUTPUTS * WORDS, PIECE // 2):
        weight += (tl.load(at + start + k, eviction_policy="evict_first"),)
        if IS_GATED:
            up_weight += (tl.load(up_at + start + k, eviction_policy="evict_first"),)
    for start in tl.static_range(0, WORDS, PIECE // 2):
        norm_weight += (tl.load(norm_weight_ptr + start + k),)
        if HAS_BRANCH:
            branch_norm += (tl.load(branch_norm_ptr + start + k),)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for start in tl.static_range(0, WORDS, PIECE // 2):
        x += (tl.load(x_ptr + start + k),)
        if HAS_BRANCH:
            branch += (tl.load(branch_ptr + start + k),)
    if HAS_BRANCH:
        normed = normed_pairs(branch, branch_norm, eps, WIDTH)
        residual = ()
        for i in tl.static_range(len(x)):
            new = rounded_pair(low(x[i]) + low(normed[i]), high(x[i]) + high(normed[i]))
            if program == 0:
                tl.store(residual_out_ptr + i * (PIECE // 2) + k, new)
            residual += (new,)
        x = residual
    x = normed_pairs(x, norm_weight, eps, WIDTH)
    y = products_of_pairs(weight, x, WIDTH // PIECE, BLOCK_OUTPUTS)
    if IS_GATED:
        gate = gelu_tanh(y.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        y = gate * products_of_pairs(up_weight, x, WIDTH // PIECE, BLOCK_OUTPUTS).to(dtype).to(tl.float32)
    tl.store(out_ptr + program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS), y.to(dtype))


@dataclass(frozen=True)
class Candidate:
    """One form of one product, with what its kernel is compiled for."""

    model: str
    kernel: str  # "qkv_projection", "output", "gated_mlp", "down" or "lm_head"
    case: Case  # its shape
    form: str
    params: dict[str, int]  # compile-time parameters by lower-case name, and the warps

    @property
    def name(self) -> str:
        return " ".join([self.model, self.kernel, self.form, *(f"{k}={v}" for k, v in self.params.items())])

    @property
    def outputs(self) -> int:
        return self.case.outputs

    @property
    def width(self) -> int:
        return self.case.width

    @property
    def has_norm(self) -> bool:
        """Whether it norms its rows itself."""
        return self.form != "loop" and self.kernel in NORMED

    @property
    def has_branch(self) -> bool:
        """Whether it adds a normed branch to its rows first."""
        return bool(self.has_norm and self.form != "held4" and self.params.get("branch", self.case.has_branch))

    @property
    def is_gated(self) -> bool:
        """Whether it ends with the activation; if not, gate and up are written as they are."""
        return self.kernel == "gated_mlp" and self.form != "held4"

    @property
    def max_rows(self) -> int:
        """How many rows it takes."""
        return self.params.get("n", 1) if self.form != "today" else 8

    @property
    def row_counts(self) -> tuple[int, ...]:
        """The numbers of rows that it is timed with."""
        return (1, 8) if self.max_rows == 8 else (self.max_rows,)


KERNELS: dict[str, Any] = {
    "held": held_kernel,
    "loop": loop_kernel,
    "held4": held4_kernel,
    "sum": sum_kernel,
    "packed": packed_kernel,
}
NORMED = ("qkv_projection", "gated_mlp", "lm_head")  # products that a norm precedes
HELD_BLOCKS = ((16, 4), (16, 8), (16, 16), (32, 8))  # outputs, slices
LOOP_BLOCKS = (  # outputs, columns of a slice, slices, stages; as many warps as slices
    (16, 64, 4, 3),
    (16, 64, 4, 4),
    (16, 64, 4, 5),
    (16, 128, 4, 3),
    (16, 128, 4, 4),
    (32, 64, 4, 4),
    (32, 128, 4, 3),
    (16, 64, 8, 4),
    (16, 128, 8, 3),
)
BEST_LOOP_BLOCK = (16, 64, 4, 4)
SUM_BLOCKS = {  # outputs, warps, columns of a piece by width; of a gated product, and of the others
    2304: (
        ((1, 4, 2048), (2, 4, 2048), (2, 8, 2048), (1, 1, 256), (2, 2, 256)),
        ((4, 4, 2048), (4, 8, 2048), (2, 1, 256), (2, 2, 256), (4, 4, 256)),
    ),
    1152: (
        ((2, 2, 1024), (2, 4, 1024), (4, 4, 1024), (2, 1, 128), (4, 2, 128)),
        ((4, 2, 1024), (4, 4, 1024), (4, 1, 128), (4, 2, 128), (8, 4, 128)),
    ),
    640: (
        ((2, 2, 512), (4, 2, 512), (2, 1, 128), (4, 2, 128)),
        ((8, 2, 512), (8, 4, 512), (4, 1, 128), (8, 4, 128)),
    ),
}


def candidates(models: list[str]) -> list[Candidate]:
    """All candidates of these models; which of them spill is known once they are compiled."""
    return [candidate for model in models for candidate in _of_model(model)]


def _of_model(model: str) -> Iterator[Candidate]:
    for case in cases(ModelConfig.from_hf(PUBLISHED[model])):
        kernel = NAMES.get(case.kernel, case.kernel)
        new = partial(Candidate, model, kernel, case)
        yield new("today", {})
        if kernel == "output":
            yield Candidate(model, kernel, case._replace(kernel="residual_linear"), "today", {"plain": 1})
        if case.width <= 2304:
            has_branch = int(case.has_branch and kernel in NORMED)
            variants = dict.fromkeys([(has_branch, 0), (has_branch, 1), (0, 0)])
            for (outputs, slices), (branch, pinned) in itertools.product(HELD_BLOCKS, variants):
                piece = case.width & -case.width
                if piece >= 16 * slices:
                    held = {"block_outputs": outputs, "slices": slices, "n": 8, "piece": piece, "warps": slices}
                    yield new("held", held | {"branch": branch, "pinned": pinned})
        for block in LOOP_BLOCKS:
            yield new("loop", _loop(*block, n=8))
        if model in MANY_ROWS_MODELS and kernel in ("gated_mlp", "down", "lm_head"):
            for n in (16, 32, 64):
                yield new("loop", _loop(*BEST_LOOP_BLOCK, n=n))
        if model in MANY_ROWS_MODELS and kernel == "gated_mlp":
            for outputs, warps in ((16, 8),) if case.width == 2048 else ((16, 4), (32, 4)):
                yield new(
                    "held4", {"block_outputs": outputs, "n": 8, "piece": case.width // 1024 * 256, "warps": warps}
                )
        if kernel in NORMED and case.width in SUM_BLOCKS:
            for outputs, warps, piece in SUM_BLOCKS[case.width][kernel != "gated_mlp"]:
                yield new("sum", {"block_outputs": outputs, "piece": piece, "warps": warps})
        if kernel in NORMED and case.width == 640:
            for outputs in (1, 2, 4) if kernel == "gated_mlp" else (2, 4, 8):
                yield new("packed", {"block_outputs": outputs, "piece": 128, "warps": 1})


def _loop(outputs: int, columns: int, slices: int, stages: int, n: int) -> dict[str, int]:
    block = {"block_outputs": outputs, "block_width": columns, "slices": slices, "stages": stages}
    return block | {"n": n, "warps": slices}


@dataclass(eq=False)
class Inputs:
    """The random operands of one product, the same for every candidate."""

    weights: torch.Tensor  # [copies, outputs * matrices, width]
    x: torch.Tensor  # [MAX_ROWS, width], as are the branch and residual_out
    branch: torch.Tensor
    residual_out: torch.Tensor
    norm_weight: torch.Tensor  # [width], as is branch_norm
    branch_norm: torch.Tensor
    device: torch.device
    eps: float = EPS

    @classmethod
    def of(cls, case: Case, copies: int, device: torch.device) -> Inputs:
        """New random operands; on the device "meta" they have no data."""
        if device.type != "meta":
            torch.manual_seed(0)
        made: dict[str, Any] = {"dtype": DTYPE, "device": device}
        weights = torch.randn(copies, case.outputs * case.matrices, case.width, **made) * case.width**-0.5
        rows = [torch.randn(MAX_ROWS, case.width, **made) for _ in range(3)]
        return cls(weights, *rows, *(torch.randn(case.width, **made) * 0.1 for _ in range(2)), device)

    def expected(self, has_norm: bool, has_branch: bool, is_gated: bool) -> torch.Tensor:
        """The products of all rows with the first copy of the weights, in fp64."""
        x = self.x.double()
        if has_branch:
            x = x + _norm(self.branch.double(), self.branch_norm)
        if has_norm:
            x = _norm(x, self.norm_weight)
        y = torch.cat([x @ part.double().T for part in self.weights[0].split(16384)], dim=1)
        if not is_gated:
            return y
        gate, up = y.chunk(2, dim=1)
        return F.gelu(gate, approximate="tanh") * up


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.double())


def launch(launcher: Launcher, candidate: Candidate, inputs: Inputs, out: torch.Tensor, copy: int, rows: int) -> None:
    """Launches a candidate on the first `rows` rows.

    Args:
        launcher: of the GPU, or one that records.
        candidate: any but today's.
        inputs: loop multiplies x as it is, as if it were normed.
        out: [MAX_ROWS, outputs], its first rows written; held4 writes gate and up, [MAX_ROWS, 2 * outputs].
        copy: index of the weights.
        rows: at most candidate.max_rows.
    """
    case, form, params = candidate.case, candidate.form, dict(candidate.params)
    warps, is_gated = params.pop("warps"), candidate.is_gated
    params.pop("branch", None)
    outputs = case.outputs * (1 if is_gated else case.matrices)
    arguments: dict[str, Any] = {"weight_ptr": inputs.weights[copy], "out_ptr": out, "rows": rows, "outputs": outputs}
    if form == "packed":
        arguments["weight_ptr"] = inputs.weights[copy].view(torch.int32)
        pairs = ("residual_out", "x", "norm_weight", "branch", "branch_norm")
        arguments |= {f"{name}_ptr": getattr(inputs, name).view(torch.int32) for name in pairs}
    if form != "held4":
        arguments["IS_GATED"] = is_gated
    if form in ("held", "sum", "packed"):
        arguments["HAS_BRANCH"] = candidate.has_branch
    if form == "held":
        arguments |= {"HAS_NORM": candidate.has_norm, "IS_PINNED": bool(params.pop("pinned"))}
    tile = params["block_outputs"]
    of_result = tile // 2 if is_gated and form in ("held", "loop") else tile
    assert outputs % of_result == 0
    constants = {name.upper(): value for name, value in params.items()}
    grid = (outputs // of_result,)
    launcher(KERNELS[form], inputs, grid, warps, **arguments, WIDTH=case.width, **constants)


def compiled(candidate: Candidate, gpu: Gpu) -> dict[str, Any]:
    """Compiles a candidate for sm_90 into Triton's cache, without a GPU: what it uses, or the error."""
    meta, target = torch.device("meta"), GPUTarget("cuda", gpu.capability, 32)
    try:
        if candidate.form == "today":
            ops = RecordingOps(gpu)
            operation(candidate.case, DTYPE, 1, device=meta)(ops, 0, None)
            for code, options in (source(recorded, target) for recorded in ops.launches):
                triton.compile(code, target=target, options=options)
            return {}
        recorder = Recorder(gpu)
        out = torch.empty(MAX_ROWS, candidate.outputs * candidate.case.matrices, dtype=DTYPE, device=meta)
        launch(recorder, candidate, Inputs.of(candidate.case, 1, meta), out, 0, 1)
        reads = Reads(("weight_ptr",), ("norm_weight_ptr", "branch_norm_ptr"))
        row = inspect(recorder.launches[0], gpu.capability, reads)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    found = {key: row[key] for key in ("registers", "stack", "shared", "programs", "weight_bytes")}
    faults = row.get("faults", [])
    if any("spills" in fault for fault in faults) or row["shared"] > SHARED_BYTES:
        return found | {"error": "; ".join(faults) or "too much shared memory"}
    return found | {"faults": [fault for fault in faults if "loaded [] bytes" not in fault]}


def compile_all(found: list[Candidate], workers: int, gpu: Gpu) -> dict[str, dict[str, Any]]:
    """What `compiled` says of each candidate, by its name. The number of outputs is not compiled in: products of one
    width share a binary."""
    keys = [
        c.case if c.form == "today" else (c.form, c.width, c.has_norm, c.has_branch, c.is_gated, *c.params.items())
        for c in found
    ]
    distinct = dict(zip(keys, found, strict=True))
    compile_one = partial(compiled, gpu=gpu)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        rows = dict(zip(distinct, pool.map(compile_one, distinct.values(), chunksize=2), strict=True))
    return {candidate.name: rows[key] for candidate, key in zip(found, keys, strict=True)}


def check(candidate: Candidate, inputs: Inputs, expected: torch.Tensor, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Runs a candidate on one row and on as many as it takes, and compares them.

    Args:
        candidate: any but today's.
        inputs: its operands.
        expected: the result for all rows.
        tolerance: of the norm of the difference, relative to that of the result.

    Returns:
        "relative_error"; "row_bits", a hash of the first row; "row_bits_equal", whether it is the same alone.

    Raises:
        AssertionError: the error is too large, or a row that is not there was written.
    """
    launcher = Launcher(gpu_of(inputs.device))
    outs = []
    for rows in (1, candidate.max_rows):
        out = torch.full(expected.shape, float("nan"), dtype=DTYPE, device=inputs.device)
        launch(launcher, candidate, inputs, out, 0, rows)
        error = float((out[:rows].double() - expected[:rows]).norm() / expected[:rows].norm())
        assert error < tolerance, f"relative error {error:.3g} at {rows} rows"
        assert bool(out[rows:].isnan().all()), f"wrote past {rows} rows"
        outs.append(out[0].view(torch.int16))
    bits = hashlib.sha256(outs[1].cpu().numpy().tobytes()).hexdigest()[:16]
    return {"relative_error": error, "row_bits": bits, "row_bits_equal": torch.equal(*outs)}


def measure(
    models: list[str],
    device: torch.device,
    read_gb_s: float,
    deadline: float,
    built: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """One result for each candidate and number of rows, "error" in it where there is none.

    Args:
        models: names in PUBLISHED.
        device: the GPU.
        read_gb_s: its read bandwidth.
        deadline: none is begun after this reading of time.monotonic().
        built: what `compile_all` returned.
    """
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in candidates(models):
        groups.setdefault((candidate.model, candidate.kernel), []).append(candidate)
    for group in groups.values():
        case = group[0].case
        copies = int(max(2, min(MAX_LAUNCHES, WEIGHT_BYTES // case.bytes(DTYPE))))
        inputs = Inputs.of(case, copies, device)
        expected = functools.cache(inputs.expected)
        for candidate in group:
            described = {"name": candidate.name, "model": candidate.model, "kernel": candidate.kernel}
            described |= {"outputs": candidate.outputs, "width": candidate.width, "form": candidate.form}
            described |= {"params": candidate.params} | built.get(candidate.name, {})
            for row in [described] if "error" in described else _measured(candidate, inputs, expected, deadline):
                gb_s = case.bytes(DTYPE) / row["time_us"] / 1e3 if "time_us" in row else 0.0
                speeds = {"gb_s": round(gb_s, 1), "share": round(gb_s / read_gb_s, 4)} if gb_s else {}
                yield described | row | speeds


def _measured(
    candidate: Candidate, inputs: Inputs, expected: Callable[..., torch.Tensor], deadline: float
) -> Iterator[dict[str, Any]]:
    """Checks and times one candidate: a result for each number of rows, or one with the error."""
    case, device, copies = candidate.case, inputs.device, len(inputs.weights)
    launches = int(max(copies, min(MAX_LAUNCHES, TIMED_BYTES // case.bytes(DTYPE)) // copies * copies))
    launcher, ops = Launcher(gpu_of(device)), ops_for(device)
    found: dict[str, Any] = {}
    try:
        if time.monotonic() > deadline:
            raise TimeoutError("no time left")
        if candidate.form != "today":
            found = check(candidate, inputs, expected(candidate.has_norm, candidate.has_branch, candidate.is_gated))
            width = candidate.outputs * (1 if candidate.is_gated else case.matrices)
            out = torch.empty(MAX_ROWS, width, dtype=DTYPE, device=device)
        for rows in candidate.row_counts:
            if candidate.form == "today":
                today = operation(case, DTYPE, copies, rows, device)
                run: Callable[[int], Any] = lambda copy, today=today: today(ops, copy, None)  # noqa: E731
            else:
                run = lambda copy, rows=rows: launch(launcher, candidate, inputs, out, copy, rows)  # noqa: E731
            us = time_us(lambda run=run: [run(i % copies) for i in range(launches)], device, repeats=7) / launches
            yield found | {"rows": rows, "time_us": round(us, 3)}
    except Exception as error:
        yield found | {"error": f"{type(error).__name__}: {error}"[:500]}


def line(row: dict[str, Any]) -> str:
    """One result for a reader."""
    used = " ".join(f"{key}={row[key]}" for key in ("registers", "shared", "programs") if key in row)
    if "time_us" in row:
        used += f" M={row['rows']} {row['time_us']:.2f} us {row['gb_s']:.0f} GB/s {row['share']:.3f}"
    if "row_bits_equal" in row:
        used += "" if row["row_bits_equal"] else " OTHER BITS"
    return f"{row['name']}: {used} {row.get('error', '')}".rstrip()


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma list")
    parser.add_argument("--minutes", type=float, default=5.0, help="nothing is begun after these")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    started, models = time.monotonic(), args.models.split(",")
    device, found = torch.device("cuda", 0), candidates(models)
    built = compile_all(found, args.workers, GPUS[90] if args.compile_only else gpu_of(device))
    compile_s = round(time.monotonic() - started, 1)
    refused = sum("error" in row for row in built.values())
    print(f"{len(found)} candidates, {refused} do not compile or spill, {compile_s} s", flush=True)
    record: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "compile_s": compile_s}
    if args.compile_only:
        record["results"] = [{"name": name} | row for name, row in built.items()]
        print(*map(line, record["results"]), sep="\n")
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        return 0
    record |= {"gpu": torch.cuda.get_device_name(), "read_gb_s": read_bandwidth_gb_s(device), "results": []}
    print(f"{record['gpu']}, read {record['read_gb_s']:.0f} GB/s", flush=True)
    gc.collect()
    gc.freeze()  # captures collect garbage: not all of torch each time
    for model in models:
        for row in measure([model], device, record["read_gb_s"], started + 60 * args.minutes, built):
            record["results"].append(row)
            print(line(row), flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

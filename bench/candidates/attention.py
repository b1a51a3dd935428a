"""Forms of decode attention that a GPU has still to choose between, beside today's.

    python -m runtime.bench.candidates.attention --out FILE [--models a,b] [--minutes M]
    python -m runtime.bench.candidates.attention --compile-only          no GPU needed

attention   one program of one warp for each row, query head and run of keys: keys and values are loaded before the wait
            as halves of a head, in the layout that the query has too, and sums go through shuffles, so that no barrier
            stands behind the wait. The new key has a program of its own, which writes the cache. Roundings are those of
            kernels/decode_attention.py; a run's partial output is not yet divided by its total.
combine     joins the runs of a head, in one launch or first in groups of 16, and writes the attention's output in the
            model's dtype, for a plain output projection.

How a row is cut into runs follows from its own length alone. Every form is held to the plain PyTorch form before it is
timed, and times are those of a layer in a captured chain over distinct caches and weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from runtime.bench.compiled import GPUS
from runtime.bench.timing import time_us
from runtime.cost.bandwidth import read_bandwidth_gb_s
from runtime.cost.machine_code import source, tool
from runtime.kernels.attention_splits import ALL_KEYS, AttentionSplits
from runtime.kernels.decode_attention import DecodeAttention, finished_scores
from runtime.kernels.launch import (
    Gpu,
    Launch,
    Launcher,
    Recorder,
    current,
    gpu_of,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from runtime.kernels.output_projection import OutputProjection
from runtime.kernels.residual_linear import ResidualLinear
from runtime.kernels.rotary import rotated_halves
from runtime.model.config import DEFAULT_SEQ_LEN, ModelConfig
from runtime.model.published import PUBLISHED

GROUP_PARTS = 17  # joined by one program of the first of two levels: one and 16 behind it
LAUNCHES = 40  # layers in one timed chain
CACHE_BYTES = 6e9  # of all distinct caches of a chain, at most
SCREENED = (128, 512, 4096)  # contexts at which every variant is timed
CONTEXTS = (128, 512, 1024, 4096)  # and the model's longest
TOLERANCE = 1e-2  # of the output's norm, against fp32
TIMES = ("attention_us", "combined_us", "projected_us")


@triton.jit
def planned_runs(position, window, KEYS: tl.constexpr, MAX_RUNS: tl.constexpr):
    """How the keys before the new one are cut: (their number, keys of one run, number of runs)."""
    older = tl.minimum(position, window - 1)
    size = tl.cdiv(tl.cdiv(older, MAX_RUNS), KEYS) * KEYS
    return older, size, tl.cdiv(older, tl.maximum(size, 1))


@triton.jit
def cached_keys(k_ptr, v_ptr, first, count, slots, half, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr):
    """Halves [KEYS / 2, 2, HEAD_DIM / 2] of the keys and values from slot `first` on, `count` of them, in the ring."""
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    ahead = 2 * tl.arange(0, KEYS // 2)[:, None, None] + tl.arange(0, 2)[None, :, None]
    slot = first + ahead
    at = tl.where(slot < slots, slot, slot - slots) * HEAD_DIM + half
    mask = ahead < count
    k1 = tl.load(k_ptr + at, mask=mask, other=0.0)
    k2 = tl.load(k_ptr + at + HALF_DIM, mask=mask, other=0.0)
    v1 = tl.load(v_ptr + at, mask=mask, other=0.0)
    v2 = tl.load(v_ptr + at + HALF_DIM, mask=mask, other=0.0)
    return k1, k2, v1, v2


@triton.jit
def embedded_head(
    head_ptr, weight1, weight2, cos, sin, eps, HEAD_DIM: tl.constexpr, HAS_QK_NORM: tl.constexpr, dtype: tl.constexpr
):
    """Halves of a query or key after its norm and rotary embedding, in fp32."""
    first = tl.load(head_ptr).to(tl.float32)
    second = tl.load(head_ptr + HEAD_DIM // 2).to(tl.float32)
    if HAS_QK_NORM:
        inverse = tl.rsqrt(tl.sum(first * first + second * second, axis=2) / HEAD_DIM + eps)[:, :, None]
        first = (first * inverse * weight1).to(dtype).to(tl.float32)
        second = (second * inverse * weight2).to(dtype).to(tl.float32)
    first, second = rotated_halves(first, second, cos, sin, dtype)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit(do_not_specialize=["slots", "window"])
def run_attention_kernel(
    partial_ptr,
    stats_ptr,
    k_cache_ptr,
    v_cache_ptr,
    qkv_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots,
    window,
    scale,
    eps,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    KEYS: tl.constexpr,
    MAX_RUNS: tl.constexpr,
):
    # One program takes one query head of one row over one run of older keys, or over the new key: the first one.
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    GROUP: tl.constexpr = HEADS // KV_HEADS
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    index = tl.program_id(1)
    kv_head = head // GROUP
    dim = tl.arange(0, HALF_DIM)
    # Twice, so that a warp holds a query as it holds two keys: 16 bytes in each lane.
    half = tl.broadcast_to(dim[None, None, :], (1, 2, HALF_DIM))
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)

    # Before the wait: what nothing in this step changes, as in decode_attention.
    position = tl.load(position_ptr + row)
    older, size, _ = planned_runs(position, window, KEYS, MAX_RUNS)
    cos = tl.load(cos_ptr + position * HALF_DIM + half).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF_DIM + half).to(tl.float32)
    qkv_row = qkv_ptr + row * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    cache_row = (row * KV_HEADS + kv_head).to(tl.int64) * slots * HEAD_DIM
    k_ptr = k_cache_ptr + cache_row
    v_ptr = v_cache_ptr + cache_row
    part = row * (MAX_RUNS + 1) + index
    partial_at = partial_ptr + (part * HEADS + head) * HEAD_DIM + dim
    stats_at = stats_ptr + part * (2 * HEADS) + head
    weight1 = 1.0
    weight2 = 1.0
    if HAS_QK_NORM:
        weight1 = 1.0 + tl.load(q_norm_ptr + half).to(tl.float32)
        weight2 = 1.0 + tl.load(q_norm_ptr + HALF_DIM + half).to(tl.float32)
    if index == 0:
        k_weight1 = 1.0
        k_weight2 = 1.0
        if HAS_QK_NORM:
            k_weight1 = 1.0 + tl.load(k_norm_ptr + half).to(tl.float32)
            k_weight2 = 1.0 + tl.load(k_norm_ptr + HALF_DIM + half).to(tl.float32)
        wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
        q_at = qkv_row + head * HEAD_DIM + half
        k_at = qkv_row + (HEADS + kv_head) * HEAD_DIM + half
        v_at = qkv_row + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + dim
        v1 = tl.load(v_at)
        v2 = tl.load(v_at + HALF_DIM)
        q1, q2 = embedded_head(q_at, weight1, weight2, cos, sin, eps, HEAD_DIM, HAS_QK_NORM, dtype)
        k1, k2 = embedded_head(k_at, k_weight1, k_weight2, cos, sin, eps, HEAD_DIM, HAS_QK_NORM, dtype)
        scores = finished_scores(tl.sum(q1 * k1 + q2 * k2, axis=2), scale, softcap, HAS_SOFTCAP, dtype)  # [1, 2]
        tl.store(partial_at, v1.to(tl.float32))
        tl.store(partial_at + HALF_DIM, v2.to(tl.float32))
        tl.store(stats_at, tl.max(tl.max(scores, axis=1), axis=0))
        tl.store(stats_at + HEADS, 1.0)
        if head % GROUP == 0:
            new_at = (position % slots) * HEAD_DIM
            once = tl.arange(0, 2)[None, :, None] == 0
            tl.store(k_ptr + new_at + half, k1.to(dtype), mask=once)
            tl.store(k_ptr + new_at + HALF_DIM + half, k2.to(dtype), mask=once)
            tl.store(v_ptr + new_at + dim, v1)
            tl.store(v_ptr + new_at + HALF_DIM + dim, v2)
    else:
        begin = position - older + (index - 1) * size
        count = tl.minimum(size, position - begin)
        if count > 0:
            first = begin % slots
            k1, k2, v1, v2 = cached_keys(k_ptr, v_ptr, first, count, slots, half, HEAD_DIM, KEYS)
            wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
            q_at = qkv_row + head * HEAD_DIM + half
            q1, q2 = embedded_head(q_at, weight1, weight2, cos, sin, eps, HEAD_DIM, HAS_QK_NORM, dtype)
            highest = float("-inf")
            total = tl.zeros([2], tl.float32)
            acc1 = tl.zeros([2, HALF_DIM], tl.float32)
            acc2 = tl.zeros([2, HALF_DIM], tl.float32)
            ahead = 2 * tl.arange(0, KEYS // 2)[:, None] + tl.arange(0, 2)[None, :]
            for start in range(0, count, KEYS):
                scores = tl.sum(k1.to(tl.float32) * q1 + k2.to(tl.float32) * q2, axis=2)  # [KEYS / 2, 2]
                scores = finished_scores(scores, scale, softcap, HAS_SOFTCAP, dtype)
                scores = tl.where(start + ahead < count, scores, float("-inf"))
                raised = tl.maximum(highest, tl.max(tl.max(scores, axis=0), axis=0))
                shrink = tl.exp(highest - raised)
                weights = tl.exp(scores - raised)
                total = total * shrink + tl.sum(weights, axis=0)
                weights = weights.to(dtype).to(tl.float32)[:, :, None]
                acc1 = acc1 * shrink + tl.sum(weights * v1.to(tl.float32), axis=0)
                acc2 = acc2 * shrink + tl.sum(weights * v2.to(tl.float32), axis=0)
                highest = raised
                if start + KEYS < count:
                    slot = first + start + KEYS
                    slot = tl.where(slot < slots, slot, slot - slots)
                    k1, k2, v1, v2 = cached_keys(k_ptr, v_ptr, slot, count - start - KEYS, slots, half, HEAD_DIM, KEYS)
            tl.store(partial_at, tl.sum(acc1, axis=0))
            tl.store(partial_at + HALF_DIM, tl.sum(acc2, axis=0))
            tl.store(stats_at, highest)
            tl.store(stats_at + HEADS, tl.sum(total, axis=0))


@triton.jit
def joined_parts(
    partial_ptr,
    stats_ptr,
    lead,
    count,
    head,
    dim,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The part `lead` and `count` more behind it: (output [dims] before its division, largest score, total)."""
    part = (lead + 1 + tl.arange(0, BLOCK_PARTS))[:, None]
    seen = tl.arange(0, BLOCK_PARTS)[:, None] < count
    stats_at = stats_ptr + part * (2 * HEADS) + head
    highest = tl.load(stats_at, mask=seen, other=float("-inf"))
    total = tl.load(stats_at + HEADS, mask=seen, other=0.0)
    partial = tl.load(partial_ptr + (part * HEADS + head) * HEAD_DIM + dim[None, :], mask=seen, other=0.0)
    lead_highest = tl.load(stats_ptr + lead * (2 * HEADS) + head)
    lead_total = tl.load(stats_ptr + lead * (2 * HEADS) + HEADS + head)
    lead_partial = tl.load(partial_ptr + (lead * HEADS + head) * HEAD_DIM + dim)
    most = tl.maximum(lead_highest, tl.max(tl.max(highest, axis=1), axis=0))
    weight = tl.exp(highest - most)
    lead_weight = tl.exp(lead_highest - most)
    joined = lead_weight * lead_partial + tl.sum(weight * partial, axis=0)
    return joined, most, lead_weight * lead_total + tl.sum(tl.sum(weight * total, axis=1), axis=0)


@triton.jit(do_not_specialize=["window"])
def combine_groups_kernel(
    group_partial_ptr,
    group_stats_ptr,
    partial_ptr,
    stats_ptr,
    position_ptr,
    window,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    KEYS: tl.constexpr,
    MAX_RUNS: tl.constexpr,
    GROUP_PARTS: tl.constexpr,
    DIMS: tl.constexpr,
):
    # One program joins one group of parts of one row and head in DIMS dims.
    GROUPS: tl.constexpr = (MAX_RUNS + GROUP_PARTS) // GROUP_PARTS
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    group = tl.program_id(2)
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    _, _, runs = planned_runs(tl.load(position_ptr + row), window, KEYS, MAX_RUNS)
    lead = group * GROUP_PARTS
    if lead <= runs:
        wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
        joined, highest, total = joined_parts(
            partial_ptr,
            stats_ptr,
            row * (MAX_RUNS + 1) + lead,
            tl.minimum(runs - lead, GROUP_PARTS - 1),
            head,
            dim,
            HEADS,
            HEAD_DIM,
            GROUP_PARTS - 1,
        )
        at = row * GROUPS + group
        tl.store(group_partial_ptr + (at * HEADS + head) * HEAD_DIM + dim, joined)
        if tl.program_id(1) == 0:
            tl.store(group_stats_ptr + at * (2 * HEADS) + head, highest)
            tl.store(group_stats_ptr + at * (2 * HEADS) + HEADS + head, total)


@triton.jit(do_not_specialize=["window"])
def combine_kernel(
    out_ptr,
    partial_ptr,
    stats_ptr,
    position_ptr,
    window,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    KEYS: tl.constexpr,
    MAX_RUNS: tl.constexpr,
    GROUP_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    DIMS: tl.constexpr,
):
    # One program joins all parts of one row and head in DIMS dims: the new key and the runs, or groups of these.
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    _, _, runs = planned_runs(tl.load(position_ptr + row), window, KEYS, MAX_RUNS)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    joined, _, total = joined_parts(
        partial_ptr, stats_ptr, row * PARTS, runs // GROUP_PARTS, head, dim, HEADS, HEAD_DIM, BLOCK_PARTS
    )
    tl.store(out_ptr + (row * HEADS + head) * HEAD_DIM + dim, (joined / total).to(out_ptr.dtype.element_ty))


Result = dict[str, Any]


class Variant(NamedTuple):
    """Compile-time constants of the candidate."""

    keys: int  # of one step of a run, a power of two
    max_runs: int  # of a row, a power of two
    warps: int  # of the attention's programs
    dims: int  # of one program of the combine kernels
    levels: int = 1

    @property
    def combine_warps(self) -> int:
        """At most 64 values of the parts in each thread."""
        parts = self.max_runs if self.levels == 1 else GROUP_PARTS - 1
        return max(1, min(8, parts * self.dims // (32 * 64)))

    @property
    def groups(self) -> int:
        """Parts of the second level."""
        return triton.cdiv(self.max_runs + 1, GROUP_PARTS)


VARIANTS = [
    Variant(keys, max_runs, 1, dims) for keys in (4, 8, 16) for max_runs in (16, 32, 64, 128) for dims in (32, 64, 256)
]
VARIANTS += [Variant(keys, 128, 1, 64, 2) for keys in (4, 8, 16)] + [Variant(keys, 64, 2, 64) for keys in (16, 32)]


class Shape(NamedTuple):
    """The attention of one kind of a model's layers."""

    model: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    has_norms: bool
    has_residual: bool
    scale: float
    eps: float
    softcap: float | None
    longest: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def bytes(self, context: int, rows: int) -> int:
        """Keys and values that attention reads, in 16 bits."""
        return 4 * rows * self.kv_heads * self.head_dim * min(context, self.window or context)


def shapes(model: str) -> list[Shape]:
    """A model's full attention, then its sliding windows."""
    config = ModelConfig.from_hf(PUBLISHED[model])
    found = {
        layer.window: Shape(
            model,
            config.hidden,
            layer.heads,
            layer.kv_heads,
            layer.head_dim,
            layer.window,
            config.family == "gemma3",
            config.family == "gemma",
            config.attention_scale,
            config.rms_norm_eps,
            config.attention_softcap,
            config.max_position_embeddings,
        )
        for layer in config.layers
    }
    return sorted(found.values(), key=lambda shape: shape.window or 0)


def new_step(
    shape: Shape, positions: list[int], length: int, copies: int, device: torch.device, dtype: torch.dtype
) -> list[DecodeAttention]:
    """A step of attention over random caches of a sequence length, in as many copies; all share their other inputs."""
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    rows, kv_heads, head_dim = len(positions), shape.kv_heads, shape.head_dim
    slots = min(length, shape.window or length)
    caches = torch.empty(copies, 2, rows, kv_heads, slots, head_dim, **made).normal_()
    angles = torch.rand(length, head_dim // 2, device=device) * 6
    qkv = torch.randn(rows, (shape.heads + 2 * kv_heads) * head_dim, **made)
    position = torch.tensor(positions, dtype=torch.int32, device=device)
    norms = {name: torch.randn(head_dim, **made) * 0.1 for name in ("q_norm", "k_norm") if shape.has_norms}
    splits = AttentionSplits.allocate(rows, shape.heads, head_dim, device)
    return [
        DecodeAttention(
            splits,
            *cache,
            qkv,
            position,
            angles.cos().to(dtype),
            angles.sin().to(dtype),
            heads=shape.heads,
            window=shape.window,
            scale=shape.scale,
            eps=shape.eps,
            softcap=shape.softcap,
            **norms,
        )
        for cache in caches
    ]


class Candidate:
    """One variant and its buffers for a number of rows."""

    def __init__(self, variant: Variant, op: DecodeAttention) -> None:
        rows, heads, head_dim = len(op.qkv), op.heads, op.k_cache.shape[3]
        made: dict[str, Any] = {"device": op.device, "dtype": torch.float32}

        def parts(count: int) -> AttentionSplits:
            return AttentionSplits(
                torch.full((rows, count, heads * head_dim), torch.nan, **made),
                torch.full((rows, count, 2, heads), torch.nan, **made),
            )

        self.variant, self.head_dim = variant, head_dim
        self.runs, self.groups = parts(1 + variant.max_runs), parts(variant.groups)
        self.out = torch.full((rows, heads * head_dim), torch.nan, device=op.device, dtype=op.qkv.dtype)

    def attend(self, launch: Launcher, op: DecodeAttention) -> None:
        """Writes the runs' partial outputs and the new key."""
        _, kv_heads, slots, head_dim = op.k_cache.shape
        keys, max_runs, warps, *_ = self.variant
        launch(
            run_attention_kernel,
            op,
            (len(op.qkv) * op.heads, 1 + min(max_runs, triton.cdiv(op.keys - 1, keys))),
            warps,
            partial_ptr=self.runs.partial,
            stats_ptr=self.runs.stats,
            slots=slots,
            window=op.keys,
            softcap=op.softcap or 1.0,
            HEADS=op.heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            HAS_QK_NORM=op.q_norm is not None,
            KEYS=keys,
            MAX_RUNS=max_runs,
        )

    def combine(self, launch: Launcher, op: DecodeAttention) -> None:
        """Writes `out` from the runs."""
        keys, max_runs, _, dims, levels = self.variant
        grid = len(op.qkv) * op.heads, self.head_dim // dims
        common: dict[str, Any] = {
            "window": ALL_KEYS if op.window is None else op.window,
            "HEADS": op.heads,
            "HEAD_DIM": self.head_dim,
            "KEYS": keys,
            "MAX_RUNS": max_runs,
            "DIMS": dims,
        }
        joined, warps, group_parts = self.runs, self.variant.combine_warps, 1
        if levels == 2:
            joined, group_parts = self.groups, GROUP_PARTS
            launch(
                combine_groups_kernel,
                op,
                (*grid, self.variant.groups),
                warps,
                group_partial_ptr=joined.partial,
                group_stats_ptr=joined.stats,
                partial_ptr=self.runs.partial,
                stats_ptr=self.runs.stats,
                GROUP_PARTS=group_parts,
                **common,
            )
        parts = joined.partial.shape[1]
        launch(
            combine_kernel,
            op,
            grid,
            warps,
            out_ptr=self.out,
            partial_ptr=joined.partial,
            stats_ptr=joined.stats,
            GROUP_PARTS=group_parts,
            PARTS=parts,
            BLOCK_PARTS=max(2, triton.next_power_of_2(parts - 1)),
            **common,
        )

    def run(self, launch: Launcher, op: DecodeAttention) -> None:
        """The whole attention."""
        self.attend(launch, op)
        self.combine(launch, op)


class WatchingLauncher(Launcher):
    """Keeps what the compiler made of the latest launch."""

    latest: Any = None

    def _start(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any], operation: Any
    ) -> None:
        with current(operation.device):
            self.latest = kernel[grid](**arguments, **options)


def gate_step(shape: Shape, context: int, length: int, device: torch.device, dtype: torch.dtype) -> DecodeAttention:
    """Eight rows of a context and shorter ones, whose slots that hold nothing yet are NaN."""
    last = context - 1
    positions = [last, 0, 1, last // 2, last // 3, max(last - 7, 0), max(last - 1, 0), last]
    (op,) = new_step(shape, positions, length, 1, device, dtype)
    for row, at in enumerate(positions):
        slots = op.k_cache.shape[2]
        for cache in (op.k_cache, op.v_cache):
            cache[row, :, at % slots] = torch.nan
            cache[row, :, at + 1 :] = torch.nan
    return op


class Truth(NamedTuple):
    """What a step of attention has to give."""

    out: torch.Tensor  # of the plain form in fp32
    new_keys: torch.Tensor  # of the plain form in the model's dtype
    new_values: torch.Tensor


def copied(op: DecodeAttention, rows: int, dtype: torch.dtype | None = None) -> DecodeAttention:
    """The first rows of a step with caches of their own, also in another dtype."""
    fields: dict[str, Any] = {name: getattr(op, name)[:rows].clone() for name in ("k_cache", "v_cache", "qkv")}
    fields |= {name: getattr(op, name) for name in ("cos", "sin", "q_norm", "k_norm")}
    if dtype is not None:
        fields = {name: None if x is None else x.to(dtype) for name, x in fields.items()}
    splits = AttentionSplits.allocate(rows, op.heads, op.k_cache.shape[3], op.device)
    return dataclasses.replace(op, out=splits, position=op.position[:rows], **fields)


def new_slots(op: DecodeAttention) -> tuple[Any, ...]:
    """Indexes the slots of a cache that a step writes."""
    return torch.arange(len(op.qkv), device=op.device), slice(None), op.position.long() % op.k_cache.shape[2]


def truth_of(op: DecodeAttention) -> Truth:
    """By the plain PyTorch form."""
    rows = len(op.qkv)
    exact, plain = copied(op, rows, torch.float32), copied(op, rows)
    exact.run_torch()
    plain.run_torch()
    at = new_slots(op)
    return Truth(exact.out.partial[:, 0], plain.k_cache[at], plain.v_cache[at])


def gate(variant: Variant, launch: Launcher, op: DecodeAttention, truth: Truth) -> Result:
    """Runs a variant on all rows and on the first alone.

    Raises:
        AssertionError: the output or the cache is wrong.
    """
    many, one = copied(op, len(op.qkv)), copied(op, 1)
    outputs = []
    for step in (many, one):
        candidate = Candidate(variant, step)
        candidate.run(launch, step)
        outputs.append(candidate.out)
    error = ((outputs[0].float() - truth.out).norm(dim=1) / truth.out.norm(dim=1)).max().item()
    if not error < TOLERANCE:
        raise AssertionError(f"relative error {error:.2e}")
    at = new_slots(op)
    new_keys = many.k_cache[at]
    if not torch.allclose(new_keys.float(), truth.new_keys.float(), rtol=1e-2, atol=1e-2):
        raise AssertionError("a new key is wrong in the cache")
    if not torch.equal(many.v_cache[at], truth.new_values):
        raise AssertionError("a new value is wrong in the cache")
    bits = torch.int16 if op.qkv.itemsize == 2 else torch.int32
    for given, before in ((many.k_cache, op.k_cache), (many.v_cache, op.v_cache)):
        given[at] = before[at]
        if not torch.equal(given.view(bits), before.view(bits)):  # NaN equals NaN so
            raise AssertionError("a slot of the cache was written that is not the new one")
    same = torch.equal(outputs[0][:1], outputs[1]) and torch.equal(new_keys[:1], one.k_cache[new_slots(one)])
    return {"relative_error": error, "row_bits_equal": same}


class Chain:
    """What is timed of a shape at a context and a number of rows: layers with caches and weights of their own."""

    def __init__(self, shape: Shape, context: int, rows: int, launch: Launcher, device: torch.device) -> None:
        dtype, length = torch.bfloat16, max(context, DEFAULT_SEQ_LEN)
        copies = int(max(2, min(LAUNCHES, CACHE_BYTES // shape.bytes(length, rows))))
        self.launch, self.launches = launch, max(copies, LAUNCHES // copies * copies)
        self.steps = new_step(shape, [context - 1] * rows, length, copies, device, dtype)
        weights = torch.randn(copies, shape.hidden, shape.width, device=device, dtype=dtype) * shape.width**-0.5
        out = torch.empty(rows, shape.hidden, device=device, dtype=dtype)
        residual = torch.randn_like(out) if shape.has_residual else None
        self.projections = [
            OutputProjection(
                out, step.out, step.position, weight, residual=residual, heads=step.heads, window=step.window
            )
            for step, weight in zip(self.steps, weights, strict=True)
        ]

    def today(self, layer: int) -> None:
        self.steps[layer].run_triton(self.launch)

    def today_projected(self, layer: int) -> None:
        self.today(layer)
        self.projections[layer].run_triton(self.launch)

    def alone(self, candidate: Candidate, layer: int) -> None:
        candidate.attend(self.launch, self.steps[layer])

    def combined(self, candidate: Candidate, layer: int) -> None:
        candidate.run(self.launch, self.steps[layer])

    def projected(self, candidate: Candidate, layer: int) -> None:
        self.combined(candidate, layer)
        today = self.projections[layer]
        ResidualLinear(today.out, candidate.out, today.weight, residual=today.residual).run_triton(self.launch)

    def time_us(self, run: Callable[..., None], *arguments: Any) -> float:
        """The time of one layer."""

        def chain() -> None:
            for index in range(self.launches):
                run(*arguments, index % len(self.steps))

        return time_us(chain, self.steps[0].device) / self.launches


def timed(
    shape: Shape, context: int, rows: int, variants: Iterable[Variant], device: torch.device, *, projected: bool
) -> Iterator[Result]:
    """Today's kernels, then every variant after its gate."""
    place: Result = {"model": shape.model, "window": shape.window, "context": context, "rows": rows}
    launch = WatchingLauncher(gpu_of(device))
    alone_us: dict[tuple[int, ...], float] = {}

    def today() -> Result:
        return {"attention_us": chain.time_us(chain.today), "projected_us": chain.time_us(chain.today_projected)}

    def candidate(variant: Variant) -> Result:
        result = gate(variant, launch, step, truth)
        given = Candidate(variant, chain.steps[0])
        chain.alone(given, 0)
        result |= {name: getattr(launch.latest, name, None) for name in ("n_regs", "n_spills")}
        runs = variant[:3]
        if runs not in alone_us:
            alone_us[runs] = chain.time_us(chain.alone, given)
        result |= {"attention_us": alone_us[runs], "combined_us": chain.time_us(chain.combined, given)}
        return result | ({"projected_us": chain.time_us(chain.projected, given)} if projected else {})

    try:
        chain = Chain(shape, context, rows, launch, device)
        step = gate_step(shape, context, max(context, DEFAULT_SEQ_LEN), device, torch.bfloat16)
        truth = truth_of(step)
        place |= {"caches": len(chain.steps), "layers": chain.launches}
    except Exception as error:  # out of memory, for one
        yield place | {"form": "inputs", "error": f"{type(error).__name__}: {error}"[:400]}
        return
    yield place | {"form": "today"} | tried(today)
    for variant in variants:
        yield place | {"form": "candidate", "variant": variant._asdict()} | tried(candidate, variant)


def tried(run: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns, or the error that it ended with."""
    try:
        return run(*arguments)
    except Exception as error:  # of one variant, which must not stop the others
        return {"error": f"{type(error).__name__}: {error}"[:400]}


def best_two(results: list[Result]) -> list[Variant]:
    """The variants that come nearest to the fastest at every screened context, on average."""
    fastest: dict[int, float] = {}
    times: dict[Variant, dict[int, float]] = {}
    wrong = set()
    for result in results:
        if result["form"] == "candidate":
            variant, context = Variant(**result["variant"]), result["context"]
            if "error" in result or not result["row_bits_equal"]:
                wrong.add(variant)
                continue
            times.setdefault(variant, {})[context] = result["combined_us"]
            fastest[context] = min(fastest.get(context, float("inf")), result["combined_us"])
    most = max(map(len, times.values()), default=0)
    complete = [variant for variant, found in times.items() if len(found) == most and variant not in wrong]
    return sorted(complete, key=lambda v: statistics.mean(t / fastest[c] for c, t in times[v].items()))[:2]


def measure(models: list[str], device: torch.device, read_gb_s: float, deadline: float) -> Iterator[Result]:
    """Times every variant at a few contexts of each model, then the two best of a model everywhere.

    Args:
        models: names of PUBLISHED.
        device: a GPU.
        read_gb_s: its read bandwidth, for the least time that the keys and values take.
        deadline: nothing new begins after this reading of time.monotonic().
    """
    chosen: dict[str, list[Variant]] = {}
    for model in models:
        shape, *_ = shapes(model)
        screened = []
        for context in SCREENED:
            for result in timed(shape, context, 1, VARIANTS, device, projected=False):
                screened.append(result)
                yield result | {"stage": "screening", "least_us": shape.bytes(context, 1) / read_gb_s / 1e3}
                if time.monotonic() > deadline:
                    return
        chosen[model] = best_two(screened)
    for shape in [shape for model in models for shape in shapes(model)]:
        for context in (*CONTEXTS, shape.longest):
            if shape.window and context <= shape.window:
                continue  # as full attention
            for rows in (1, 8):
                for result in timed(shape, context, rows, chosen[shape.model], device, projected=True):
                    yield result | {"stage": "best", "least_us": shape.bytes(context, rows) / read_gb_s / 1e3}
                    if time.monotonic() > deadline:
                        return


def recorded(models: list[str], gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """Every launch of a measurement, on tensors without data, with its variant's name; each kernel once."""
    seen = set()
    for shape in [shape for model in models for shape in shapes(model)]:
        recorder = Recorder(gpu)
        chain = Chain(shape, DEFAULT_SEQ_LEN, 1, recorder, torch.device("meta"))
        for variant in (None, *VARIANTS):
            before = len(recorder.launches)
            if variant is None:
                chain.today_projected(0)
            else:
                chain.projected(Candidate(variant, chain.steps[0]), 0)
            for launch in recorder.launches[before:]:
                constants = {name: x for name, x in launch.arguments.items() if name.isupper()}
                key = launch.kernel.__name__, str(constants), str(launch.options)
                if key not in seen:
                    seen.add(key)
                    yield f"{shape.model} {tuple(variant or ())}", launch


def compiled(models: list[str], gpu: Gpu, part: int, of: int, report: bool) -> list[str]:
    """Compiles one of several shares of the kernels into Triton's cache, where a launch finds them; with a report,
    returns a line for each."""
    target, lines = GPUTarget("cuda", gpu.capability, 32), []
    for name, launch in list(recorded(models, gpu))[part::of]:
        try:
            code, options = source(launch, target)
            made = triton.compile(code, target=target, options=options)
        except Exception as error:  # told again where the variant is timed
            lines.append(f"{name} {launch.kernel.__name__}: {type(error).__name__}: {error}"[:400])
            continue
        if report:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(made.asm["cubin"])
                file.flush()
                usage = tool("cuobjdump", "--dump-resource-usage", file.name)
                sass = tool("nvdisasm", "-c", file.name)
            registers, stack, local = re.findall(r"\b(?:REG|STACK|LOCAL):(\d+)", usage)
            barriers, wide = sass.count("BAR.SYNC"), len(re.findall(r"LDG\.E\S*\.128", sass))
            spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
            lines.append(
                f"{name} {launch.kernel.__name__.removesuffix('_kernel')}: {registers} registers, "
                f"spills: {stack}+{local} bytes, {spills} instructions; {made.metadata.shared} bytes shared, "
                f"{barriers} barriers, {wide} of {sass.count('LDG.E')} loads of 16 bytes"
            )
    return lines


def compile_all(models: list[str], gpu: Gpu, workers: int, report: bool) -> list[str]:
    """Compiles everything in parallel."""
    jobs = [(models, gpu, part, workers, report) for part in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return sorted(line for lines in pool.starmap(compiled, jobs, chunksize=1) for line in lines)


def line_of(result: Result) -> str:
    """A result in short."""
    times = [f"{name[:-3]} {result[name]:.2f}" for name in TIMES if name in result]
    notes = [] if result.get("row_bits_equal", True) else ["ROW BITS DIFFER"]
    what = " ".join(map(str, result.get("variant", {"": result["form"]}).values()))
    where = f"{result['model']} {result['context']} window {result['window']} rows {result['rows']}"
    return f"{where} | {what} | {', '.join(times + notes + [result.get('error', '')])}"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PUBLISHED), help=f"comma list of {', '.join(PUBLISHED)}")
    parser.add_argument("--minutes", type=float, default=2.0, help="nothing new is timed after")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--compile-only", action="store_true", help="print what the compiler makes of each kernel")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args(argv)
    began, models = time.monotonic(), args.models.split(",")
    if args.compile_only:
        print(*compile_all(models, GPUS[90], args.workers, True), sep="\n")
        return 0
    if args.out is None or not torch.cuda.is_available():
        parser.error("expected --out and a CUDA device, or --compile-only")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = gpu_of(device)
    assert gpu is not None
    print(*compile_all(models, gpu, args.workers, False), sep="\n")
    compile_s = time.monotonic() - began
    print(f"compiled in {compile_s:.0f} s", flush=True)
    read_gb_s = read_bandwidth_gb_s(device)
    record: Result = {"gpu": gpu.name, "torch": torch.__version__, "triton": triton.__version__}
    record |= {"compile_s": compile_s, "read_gb_s": read_gb_s, "results": []}
    place = None
    for result in measure(models, device, read_gb_s, began + 60 * args.minutes):
        if place not in (None, result["context"]):
            args.out.write_text(json.dumps(record, indent=1) + "\n")
        place = result["context"]
        record["results"].append(result)
        print(line_of(result), flush=True)
    args.out.write_text(json.dumps(record | {"total_s": time.monotonic() - began}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

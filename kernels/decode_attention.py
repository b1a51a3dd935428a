"""Attention of one new query per row over its cached keys: q/k norm, rotary embedding, cache write, attention.

    q, k, v = the heads of a row of qkv
    q, k    = rms_norm(q, q_norm), rms_norm(k, k_norm)                      Gemma 3
    q, k    = rotary at the row's position: d(d(q * cos) + d(rotate_half(q) * sin))
    cache[position % slots] = k, v
    out     = softmax(scale * q K^T) V over the last min(position + 1, window) keys

d is the model's dtype. Gemma 1 and 3 keep scores in fp32 until the output. Gemma 2 caps them and rounds at every step:
QK^T -> d, * scale -> d, / cap -> d, tanh -> d, * cap -> d, softmax in fp32 -> d, . V -> d. The scale is applied after
QK^T, since it need not be a power of two. Query head h reads key head h // (heads / kv_heads).
Each split of the keys is a program of its own, which writes a partial output in fp32; a second kernel combines them.
The kernel here serves models of one row, and those with more than 16 query heads to a key head; group_attention.py has
the kernel for all others.
Bytes moved: keys and values, 2 * kv_heads * head_dim * keys * sizeof(d) per row; the splits stay in L2.
Source: Gemma3Attention, Gemma2Attention and sdpa_attention_forward in transformers.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from runtime.kernels.attention import attention_torch, history
from runtime.kernels.attention_splits import (
    COMBINE_WARPS,
    COMBINED_DIMS,
    COMBINED_SPLITS,
    GROUP_ROWS,
    AttentionSplits,
    check_splits,
    combine_splits_kernel,
    in_groups,
    most_splits,
    planned_splits,
    split_plan,
)
from runtime.kernels.checks import check, check_rotary, check_rows, check_units
from runtime.kernels.group_attention import GROUP_WARPS, group_attention_kernel
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import NumbaCall, Operation
from runtime.kernels.rms_norm import rms_norm_torch
from runtime.kernels.rotary import rotary_torch, rotated_halves
from runtime.kernels.softcap import finished_scores
from runtime.kernels.triton_function import cdiv, jit, next_power_of_2, tl


def decode_attention_torch(op: DecodeAttention) -> None:
    """Row by row, each over exactly the keys that it sees, oldest first."""
    heads, window, qkv = op.heads, op.window, op.qkv
    kv_heads, slots, head_dim = op.k_cache.shape[1:]
    if op.q_norm is not None and op.k_norm is not None:
        norm = torch.cat((op.q_norm.expand(heads, -1), op.k_norm.expand(kv_heads, -1)))
    for row, at in enumerate(op.position.tolist()):
        states = qkv[row].view(-1, head_dim)
        rotated, new_values = states[: heads + kv_heads], states[heads + kv_heads :]
        if op.q_norm is not None:
            rotated = rms_norm_torch(rotated, norm, op.eps)
        rotated = rotary_torch(rotated, op.cos[at], op.sin[at])
        op.k_cache[row, :, at % slots] = rotated[heads:]
        op.v_cache[row, :, at % slots] = new_values

        count = at + 1 if window is None else min(at + 1, window)
        keys = history(op.k_cache[row : row + 1], at + 1, count)
        values = history(op.v_cache[row : row + 1], at + 1, count)
        mask = torch.ones(1, 1, 1, count, dtype=torch.bool, device=qkv.device) if count == window else None
        query = rotated[:heads].view(1, heads, 1, head_dim)
        attended = attention_torch(query, keys, values, scale=op.scale, mask=mask, softcap=op.softcap)
        op.out[row] = attended.view(-1)


@jit
def cached_keys(k_ptr, v_ptr, first, count, slots, half, HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Halves [BLOCK_KEYS / 2, 2, BLOCK_HALF] of the ring's keys and values from slot `first` on; zeros past `count` of
    them."""
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    ahead = 2 * tl.arange(0, BLOCK_KEYS // 2)[:, None, None] + tl.arange(0, 2)[None, :, None]
    slot = first + ahead
    at = tl.where(slot < slots, slot, slot - slots) * HEAD_DIM + half
    mask = (ahead < count) & (half < HALF_DIM)
    k1 = tl.load(k_ptr + at, mask=mask, other=0.0)
    k2 = tl.load(k_ptr + at + HALF_DIM, mask=mask, other=0.0)
    v1 = tl.load(v_ptr + at, mask=mask, other=0.0)
    v2 = tl.load(v_ptr + at + HALF_DIM, mask=mask, other=0.0)
    return k1, k2, v1, v2


@jit
def rotated_head(
    head_ptr,
    weight1,
    weight2,
    cos,
    sin,
    half,
    eps,
    HEAD_DIM: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    dtype: tl.constexpr,
):
    """Halves [1, 2, BLOCK_HALF] of a query or key after its norm and rotary embedding, in fp32."""
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    first = tl.load(head_ptr + half, mask=half < HALF_DIM, other=0.0).to(tl.float32)
    second = tl.load(head_ptr + HALF_DIM + half, mask=half < HALF_DIM, other=0.0).to(tl.float32)
    if HAS_QK_NORM:
        inverse = tl.rsqrt(tl.sum(first * first + second * second, axis=2) / HEAD_DIM + eps)[:, :, None]
        first = (first * inverse * weight1).to(dtype).to(tl.float32)
        second = (second * inverse * weight2).to(dtype).to(tl.float32)
    first, second = rotated_halves(first, second, cos, sin, dtype)
    return first.to(tl.float32), second.to(tl.float32)


@jit
def norm_halves(weight_ptr, half, HALF_DIM: tl.constexpr, HAS_QK_NORM: tl.constexpr):
    """The multipliers of a per-head norm, as two halves."""
    if HAS_QK_NORM:
        weight1 = tl.load(weight_ptr + half, mask=half < HALF_DIM, other=0.0)
        weight2 = tl.load(weight_ptr + HALF_DIM + half, mask=half < HALF_DIM, other=0.0)
        return 1.0 + weight1.to(tl.float32), 1.0 + weight2.to(tl.float32)
    else:
        return 1.0, 1.0


@jit(do_not_specialize=["slots", "window", "row_splits"])
def decode_attention_kernel(
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
    row_splits,
    scale,
    eps,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    FEW_SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    # One program, a warp, takes one query head of one row over one split of its keys. A query has the layout of two
    # keys, so that nothing goes through shared memory and nothing waits at a barrier.
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    GROUP: tl.constexpr = HEADS // KV_HEADS
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    index = tl.program_id(1)
    kv_head = head // GROUP
    dim = tl.arange(0, BLOCK_HALF)
    half = tl.broadcast_to(dim[None, None, :], (1, 2, BLOCK_HALF))
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)

    # Before the wait: the position and the keys and values of earlier steps, which nothing in this step changes. This
    # is safe because qkv_projection lets this kernel start only after its own wait.
    position = tl.load(position_ptr + row)
    older, size, _ = planned_splits(position, window, FEW_SPLITS, SPLIT_KEYS, MOST_SPLITS, BLOCK_KEYS)
    cos = tl.load(cos_ptr + position * HALF_DIM + half, mask=half < HALF_DIM, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF_DIM + half, mask=half < HALF_DIM, other=0.0).to(tl.float32)
    q_weight1, q_weight2 = norm_halves(q_norm_ptr, half, HALF_DIM, HAS_QK_NORM)
    qkv_row = qkv_ptr + row * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    cache_row = (row * KV_HEADS + kv_head).to(tl.int64) * slots * HEAD_DIM
    k_ptr = k_cache_ptr + cache_row
    v_ptr = v_cache_ptr + cache_row
    split = row * row_splits + index
    partial_at = partial_ptr + (split * HEADS + head) * HEAD_DIM + dim
    stats_at = stats_ptr + split * (2 * HEADS) + head
    q_at = qkv_row + head * HEAD_DIM
    in_half = dim < HALF_DIM
    if index == 0:
        k_weight1, k_weight2 = norm_halves(k_norm_ptr, half, HALF_DIM, HAS_QK_NORM)
        wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
        k_at = qkv_row + (HEADS + kv_head) * HEAD_DIM
        v_at = qkv_row + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + dim
        v1 = tl.load(v_at, mask=in_half, other=0.0)
        v2 = tl.load(v_at + HALF_DIM, mask=in_half, other=0.0)
        q1, q2 = rotated_head(q_at, q_weight1, q_weight2, cos, sin, half, eps, HEAD_DIM, HAS_QK_NORM, dtype)
        k1, k2 = rotated_head(k_at, k_weight1, k_weight2, cos, sin, half, eps, HEAD_DIM, HAS_QK_NORM, dtype)
        scores = finished_scores(tl.sum(q1 * k1 + q2 * k2, axis=2), scale, softcap, HAS_SOFTCAP, dtype)  # [1, 2]
        tl.store(partial_at, v1.to(tl.float32), mask=in_half)
        tl.store(partial_at + HALF_DIM, v2.to(tl.float32), mask=in_half)
        tl.store(stats_at, tl.max(tl.max(scores, axis=1), axis=0))
        tl.store(stats_at + HEADS, 1.0)
        if head % GROUP == 0:
            new_at = (position % slots) * HEAD_DIM
            once = (tl.arange(0, 2)[None, :, None] == 0) & (half < HALF_DIM)
            tl.store(k_ptr + new_at + half, k1.to(dtype), mask=once)
            tl.store(k_ptr + new_at + HALF_DIM + half, k2.to(dtype), mask=once)
            tl.store(v_ptr + new_at + dim, v1, mask=in_half)
            tl.store(v_ptr + new_at + HALF_DIM + dim, v2, mask=in_half)
    else:
        begin = position - older + (index - 1) * size
        count = tl.minimum(size, position - begin)
        if count > 0:
            first = begin % slots
            k1, k2, v1, v2 = cached_keys(k_ptr, v_ptr, first, count, slots, half, HEAD_DIM, BLOCK_KEYS)
            wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
            q1, q2 = rotated_head(q_at, q_weight1, q_weight2, cos, sin, half, eps, HEAD_DIM, HAS_QK_NORM, dtype)
            highest = float("-inf")
            total = tl.zeros([2], tl.float32)
            acc1 = tl.zeros([2, BLOCK_HALF], tl.float32)
            acc2 = tl.zeros([2, BLOCK_HALF], tl.float32)
            ahead = 2 * tl.arange(0, BLOCK_KEYS // 2)[:, None] + tl.arange(0, 2)[None, :]
            for start in range(0, count, BLOCK_KEYS):
                scores = tl.sum(k1.to(tl.float32) * q1 + k2.to(tl.float32) * q2, axis=2)  # [BLOCK_KEYS / 2, 2]
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
                if start + BLOCK_KEYS < count:
                    slot = first + start + BLOCK_KEYS
                    slot = tl.where(slot < slots, slot, slot - slots)
                    left = count - start - BLOCK_KEYS
                    k1, k2, v1, v2 = cached_keys(k_ptr, v_ptr, slot, left, slots, half, HEAD_DIM, BLOCK_KEYS)
            tl.store(partial_at, tl.sum(acc1, axis=0), mask=in_half)
            tl.store(partial_at + HALF_DIM, tl.sum(acc2, axis=0), mask=in_half)
            tl.store(stats_at, highest)
            tl.store(stats_at + HEADS, tl.sum(total, axis=0))


@dataclass(frozen=True, eq=False, repr=False)
class DecodeAttention(Operation):
    """Adds each row's new key and value to its cache and attends to the keys that the row may see.

    Args:
        out: [rows, heads * head_dim], written.
        k_cache, v_cache: [at least rows, kv_heads, slots, head_dim]; slot position % slots of each row is written.
        qkv: [rows, (heads + 2 * kv_heads) * head_dim], 1 to 64 rows.
        position: [rows] int32, the new token's position in its row: the number of tokens already cached. At most
            len(cos) - 1, which the host must ensure.
        cos, sin: [max_seq_len, head_dim / 2], the rotary tables of this layer.
        q_norm, k_norm: [head_dim] (multiplier 1 + weight), both or neither.
        heads: query heads, a multiple of kv_heads.
        window: keys that a query sees, itself included; None for all.
        scale: multiplies QK^T.
        eps: of the q/k norm.
        softcap: Gemma 2's cap on scores; None for none.
        splits: a workspace for as many rows; only Triton needs it.
    """

    name = "decode_attention"

    out: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    qkv: torch.Tensor
    position: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    _: KW_ONLY
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    heads: int
    window: int | None = None
    scale: float
    eps: float = 0.0
    softcap: float | None = None
    splits: AttentionSplits | None = None

    @property
    def keys(self) -> int:
        """The most keys that a row ever sees."""
        return len(self.cos) if self.window is None else min(self.window, len(self.cos))

    def check(self) -> None:
        self._check_all(*check_rows("qkv", self.qkv), len(self.qkv))

    def _check_all(self, rows: int, width: int, sequences: int) -> None:
        """Checks everything, given the sizes of qkv and how many rows the cache has to have."""
        qkv, cache, heads = self.qkv, self.k_cache, self.heads
        dtype, device = qkv.dtype, qkv.device
        if cache.dim() != 4 or len(cache) < sequences:
            raise ValueError(
                f"k_cache: expected [at least {sequences}, kv_heads, slots, head_dim], got shape {tuple(cache.shape)}"
            )
        _, kv_heads, slots, head_dim = cache.shape
        if heads % kv_heads or width != (heads + 2 * kv_heads) * head_dim:
            raise ValueError(
                f"qkv: expected (heads + 2 * kv_heads) * head_dim = ({heads} + 2 * {kv_heads}) * {head_dim} columns "
                f"and heads a multiple of kv_heads, got {width} columns"
            )
        check("k_cache", cache, tuple(cache.shape), dtype, device)
        check("v_cache", self.v_cache, tuple(cache.shape), dtype, device)
        check("out", self.out, (rows, heads * head_dim), dtype, device)
        check("position", self.position, (rows,), torch.int32, device)
        check_rotary(self.cos, self.sin, self.q_norm, self.k_norm, head_dim, qkv)
        if slots < self.keys:
            raise ValueError(f"k_cache: expected at least {self.keys} slots, got {slots}")

    def run_torch(self) -> None:
        decode_attention_torch(self)

    def run_numba(self, call: NumbaCall) -> None:
        rows, kv_heads, slots, _ = self.k_cache.shape  # the cache's, so that steps of any number of rows share scratch
        check_units(len(self.qkv), kv_heads)
        call(
            self,
            scores=call.scratch(2, rows, self.heads, slots)[0],
            weights=call.scratch(2, rows, self.heads, slots)[1],
            totals=call.scratch(rows, self.heads),
            window=self.keys,
        )

    def run_triton(self, launch: Launcher) -> None:
        planned, splits = self._planned(launch.max_rows)
        if in_groups(launch.max_rows, self.heads_of_key):
            self._launch_groups(launch, planned, range(1 + splits))
        else:
            grid = (len(self.qkv) * self.heads, 1 + splits)
            launch(decode_attention_kernel, self, grid, 1, **planned, **self._given)
        self._launch_combine(launch, planned)

    @property
    def heads_of_key(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.k_cache.shape[1]

    def _planned(self, max_rows: int | None) -> tuple[dict[str, Any], int]:
        """The arguments that the kernels of both launches share, and the most splits of older keys that a row can
        have."""
        rows, heads, head_dim, dtype = len(self.qkv), self.heads, self.k_cache.shape[3], self.qkv.dtype
        most = most_splits(self.keys, dtype, max_rows, self.heads_of_key)
        check_splits("splits", self.splits, rows, most, heads * head_dim, heads, self.qkv.device)
        assert self.splits is not None
        partial, stats = self.splits
        plan, keys = split_plan(dtype, max_rows, self.heads_of_key)
        return {
            "partial_ptr": partial,
            "stats_ptr": stats,
            "window": self.keys,
            "row_splits": partial.shape[1],
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "FEW_SPLITS": plan.few,
            "SPLIT_KEYS": plan.keys,
            "MOST_SPLITS": plan.most,
            "BLOCK_KEYS": keys,
        }, most

    @property
    def _given(self) -> dict[str, Any]:
        """Further arguments of the attention kernels."""
        _, kv_heads, slots, head_dim = self.k_cache.shape
        return {
            "slots": slots,
            "softcap": self.softcap or 1.0,
            "KV_HEADS": kv_heads,
            "HAS_QK_NORM": self.q_norm is not None,
            "BLOCK_HALF": next_power_of_2(head_dim // 2),
        }

    def _launch_groups(self, launch: Launcher, planned: dict[str, Any], splits: range, **sequence: Any) -> None:
        """Launches the tensor-core kernel for some of the rows' splits; `sequence` holds its extra arguments where the
        rows are one sequence."""
        kv_heads, head_dim, given = self.k_cache.shape[1], self.k_cache.shape[3], self._given
        given |= dict.fromkeys(("new_keys_ptr", "new_values_ptr", "row_ptr")) | sequence
        given["first_split"] = splits.start if sequence else None
        # A tensor-core product needs at least 16 columns.
        given |= {
            "IS_SEQUENCE": bool(sequence),
            "GROUP_ROWS": GROUP_ROWS,
            "BLOCK_HALF": max(16, given["BLOCK_HALF"]),
            "BLOCK_DIM": max(16, next_power_of_2(head_dim)),
        }
        grid = (len(self.qkv) * kv_heads, len(splits))
        launch(group_attention_kernel, self, grid, GROUP_WARPS, **planned, **given)

    def _launch_combine(self, launch: Launcher, planned: dict[str, Any]) -> None:
        """Launches the kernel that combines the splits."""
        head_dim = self.k_cache.shape[3]
        dims = min(COMBINED_DIMS, next_power_of_2(head_dim))
        grid = (len(self.qkv) * self.heads, cdiv(head_dim, dims))
        warps = max(1, COMBINE_WARPS * planned["FEW_SPLITS"] // COMBINED_SPLITS)
        launch(combine_splits_kernel, self, grid, warps, BLOCK_DIM=dims, **planned)

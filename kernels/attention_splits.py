"""The splits of keys that decode_attention spreads a row over, and how they are combined.

    m   = max over splits of highest[split]
    out = d(sum of exp(highest[split] - m) * partial[split] / sum of exp(highest[split] - m) * total[split])

highest and total are a split's largest score and its sum of exp(score - highest), partial its sum of
exp(score - highest) * V; all in fp32, d is the model's dtype. The first split is the new key alone, the others are runs
of the older keys. How a row is split follows from its length alone, so its sums do not depend on what shares the batch,
and one compiled kernel and one graph serve every length. Bytes moved: the splits, 4 * heads * head_dim for each, which
stay in the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from runtime.kernels.checks import check
from runtime.kernels.launch import let_next_kernel_start, wait_for_previous_kernel

# Of the older keys, at most. On an H200 fewer cost time from 1,000 keys on where a split is a warp's work.
MAX_SPLITS = 128
# Stands for no window.
ALL_KEYS = 2**30
# What one program of the combine kernel writes, and its warps.
COMBINED_DIMS, COMBINE_WARPS = 32, 2


def block_keys(dtype: torch.dtype) -> int:
    """Keys that one warp holds at once; every split is a multiple of them."""
    return 8 if dtype.itemsize == 2 else 4


class AttentionSplits(NamedTuple):
    """What decode_attention's Triton kernels leave between their two launches."""

    partial: torch.Tensor  # [rows, 1 + MAX_SPLITS, heads * head_dim] fp32
    stats: torch.Tensor  # [rows, 1 + MAX_SPLITS, 2, heads] fp32: highest and total

    def __repr__(self) -> str:
        return f"AttentionSplits({len(self.partial)} rows, {self.partial.device})"

    @classmethod
    def allocate(cls, rows: int, heads: int, head_dim: int, device: torch.device) -> AttentionSplits:
        """Makes the buffers for `rows` rows."""
        return cls(
            torch.zeros(rows, 1 + MAX_SPLITS, heads * head_dim, dtype=torch.float32, device=device),
            torch.zeros(rows, 1 + MAX_SPLITS, 2, heads, dtype=torch.float32, device=device),
        )


def check_splits(
    name: str, splits: AttentionSplits | None, rows: int, width: int, heads: int, device: torch.device
) -> None:
    """Checks the workspace of `rows` rows of `heads` heads and `width` columns.

    Raises:
        TypeError, ValueError: not AttentionSplits, or a dtype, shape, device or stride differs.
    """
    if not isinstance(splits, AttentionSplits):
        raise TypeError(f"{name}: expected AttentionSplits, got {type(splits).__name__}")
    check(f"{name}.partial", splits.partial, (rows, 1 + MAX_SPLITS, width), torch.float32, device)
    check(f"{name}.stats", splits.stats, (rows, 1 + MAX_SPLITS, 2, heads), torch.float32, device)


def plan_splits(position: int, window: int | None, block_keys: int, max_splits: int) -> tuple[int, int, int]:
    """How the keys before the new one are split: (their number, keys of one split, number of splits)."""
    older = position if window is None else min(position, window - 1)
    size = triton.cdiv(triton.cdiv(older, max_splits), block_keys) * block_keys
    return older, size, triton.cdiv(older, max(size, 1))


@triton.jit
def planned_splits(position, window, MAX_SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """How the keys before the new one are split: (their number, keys of one split, number of splits)."""
    older = tl.minimum(position, window - 1)
    size = tl.cdiv(tl.cdiv(older, MAX_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    return older, size, tl.cdiv(older, tl.maximum(size, 1))


@triton.jit(do_not_specialize=["window"])
def combine_splits_kernel(
    out_ptr,
    partial_ptr,
    stats_ptr,
    position_ptr,
    window,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # One program combines all splits of one row and head in BLOCK_DIM dims.
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    dim = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    # Before the wait: the position, which nothing before the end of the step changes.
    _, _, splits = planned_splits(tl.load(position_ptr + row), window, MAX_SPLITS, BLOCK_KEYS)
    new = row * (1 + MAX_SPLITS)
    older = new + 1 + tl.arange(0, MAX_SPLITS)[:, None]
    is_used = tl.arange(0, MAX_SPLITS)[:, None] < splits
    in_head = dim < HEAD_DIM
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    stats_at = stats_ptr + older * (2 * HEADS) + head
    highest = tl.load(stats_at, mask=is_used, other=float("-inf"))  # [MAX_SPLITS, 1]
    total = tl.load(stats_at + HEADS, mask=is_used, other=0.0)
    partial_at = partial_ptr + (older * HEADS + head) * HEAD_DIM + dim[None, :]
    partial = tl.load(partial_at, mask=is_used & in_head[None, :], other=0.0)  # [MAX_SPLITS, BLOCK_DIM]
    new_highest = tl.load(stats_ptr + new * (2 * HEADS) + head)
    new_total = tl.load(stats_ptr + new * (2 * HEADS) + HEADS + head)
    new_partial = tl.load(partial_ptr + (new * HEADS + head) * HEAD_DIM + dim, mask=in_head, other=0.0)
    most = tl.maximum(new_highest, tl.max(tl.max(highest, axis=1), axis=0))
    weight = tl.exp(highest - most)
    new_weight = tl.exp(new_highest - most)
    sums = new_weight * new_partial + tl.sum(weight * partial, axis=0)
    total = new_weight * new_total + tl.sum(tl.sum(weight * total, axis=1), axis=0)
    # The attention's output is a tensor of the model's dtype in Hugging Face.
    tl.store(out_ptr + (row * HEADS + head) * HEAD_DIM + dim, (sums / total).to(out_ptr.dtype.element_ty), mask=in_head)

"""The splits of keys that decode_attention spreads a row over, and how they are combined.

    m   = max over splits of highest[split]
    out = d(sum of exp(highest[split] - m) * partial[split] / sum of exp(highest[split] - m) * total[split])

highest and total are a split's largest score and its sum of exp(score - highest), partial its sum of exp(score -
highest) * V; all in fp32, d is the model's dtype. The first split is the new key alone, the others are ranges of the
older keys. How a row is split depends on its current length alone, not on how long it may become: its sums depend
neither on what shares the batch nor on max_seq_len, and one compiled kernel and one graph serve every length. Bytes
moved: the splits, 4 * heads * head_dim for each, which stay in the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from runtime.kernels.checks import check
from runtime.kernels.launch import let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.triton_function import cdiv, jit, tl

# Stands for no window.
ALL_KEYS = 2**30
# How many dims one program of the combine kernel writes, and its warps where it takes COMBINED_SPLITS at once.
COMBINED_DIMS, COMBINE_WARPS, COMBINED_SPLITS = 32, 2, 128
# Query heads of one key head, padded to the tensor cores' height.
GROUP_ROWS = 16


class SplitPlan(NamedTuple):
    """How the older keys of a row are split: into up to `few` splits, in longer rows into splits of `keys` keys each,
    in the longest into up to `most`; a split is always whole blocks of keys."""

    few: int  # a power of two
    keys: int
    most: int

    def most_of(self, keys: int, block_keys: int) -> int:
        """The most splits that a row of up to `keys` older keys can have."""
        if keys <= self.few * self.keys:
            return min(self.few, cdiv(keys, block_keys))
        return max(self.few, min(self.most, cdiv(keys, self.keys)))


# Splits of one warp each: on an H200 fewer than 128 cost time from 1,000 keys on. Beyond 8,192 keys the numbers come
# from simulation alone: an H100 runs 352 splits of four heads at once; more than 64 on tensor cores cost time where all
# of eight rows are long.
WARP_SPLITS = SplitPlan(few=128, keys=64, most=352)
GROUP_SPLITS = SplitPlan(few=32, keys=256, most=64)


def block_keys(dtype: torch.dtype) -> int:
    """Keys that one warp holds at once; every split is a multiple of that many."""
    return 8 if dtype.itemsize == 2 else 4


def group_block_keys(dtype: torch.dtype) -> int:
    """The same for a program on tensor cores."""
    return 32 if dtype.itemsize == 2 else 16


def in_groups(max_rows: int | None, heads_of_key: int) -> bool:
    """Whether one program takes all query heads of a key head. For a model of a single row, a warp for each head is
    fastest; tensor cores read the keys once for all of them."""
    return max_rows != 1 and heads_of_key <= GROUP_ROWS


def split_plan(dtype: torch.dtype, max_rows: int | None, heads_of_key: int) -> tuple[SplitPlan, int]:
    """The plan for a model of up to `max_rows` rows, and the number of keys in a block."""
    if in_groups(max_rows, heads_of_key):
        return GROUP_SPLITS, group_block_keys(dtype)
    return WARP_SPLITS, block_keys(dtype)


def most_splits(keys: int, dtype: torch.dtype, max_rows: int | None, heads_of_key: int) -> int:
    """The most splits of older keys that a row can have that sees up to `keys` keys."""
    plan, block = split_plan(dtype, max_rows, heads_of_key)
    return plan.most_of(keys - 1, block)


class AttentionSplits(NamedTuple):
    """What decode_attention's Triton kernel leaves for the one that combines its splits: for each row the new key's
    split, then as many as its older keys may have."""

    partial: torch.Tensor  # [rows, splits, heads * head_dim] fp32
    stats: torch.Tensor  # [rows, splits, 2, heads] fp32: highest and total

    def __repr__(self) -> str:
        return f"AttentionSplits({len(self.partial)} rows, {self.partial.device})"

    @classmethod
    def allocate(cls, rows: int, older: int, heads: int, head_dim: int, device: torch.device) -> AttentionSplits:
        """Makes the buffers for `rows` rows with at most `older` splits of older keys each."""
        return cls(
            torch.zeros(rows, 1 + older, heads * head_dim, dtype=torch.float32, device=device),
            torch.zeros(rows, 1 + older, 2, heads, dtype=torch.float32, device=device),
        )


def check_splits(
    name: str, splits: AttentionSplits | None, rows: int, older: int, width: int, heads: int, device: torch.device
) -> None:
    """Checks the workspace of `rows` rows of `heads` heads and `width` columns, with room for at least `older` splits
    of older keys each.

    Raises:
        TypeError, ValueError: not AttentionSplits, or a dtype, shape, device or stride differs.
    """
    if not isinstance(splits, AttentionSplits):
        raise TypeError(f"{name}: expected AttentionSplits, got {type(splits).__name__}")
    count = splits.partial.shape[1] if splits.partial.dim() == 3 else 0
    count = max(count, 1 + older)
    check(f"{name}.partial", splits.partial, (rows, count, width), torch.float32, device)
    check(f"{name}.stats", splits.stats, (rows, count, 2, heads), torch.float32, device)


def plan_splits(position: int, window: int | None, block_keys: int, plan: SplitPlan) -> tuple[int, int, int]:
    """How the keys before the new one are split: (their number, keys of one split, number of splits)."""
    older = position if window is None else min(position, window - 1)
    size = max(min(cdiv(older, plan.few), plan.keys), cdiv(older, plan.most))
    size = cdiv(size, block_keys) * block_keys
    return older, size, cdiv(older, max(size, 1))


@jit
def planned_splits(
    position,
    window,
    FEW_SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """How the keys before the new one are split: (their number, keys of one split, number of splits)."""
    older = tl.minimum(position, window - 1)
    size = tl.maximum(tl.minimum(tl.cdiv(older, FEW_SPLITS), SPLIT_KEYS), tl.cdiv(older, MOST_SPLITS))
    size = tl.cdiv(size, BLOCK_KEYS) * BLOCK_KEYS
    return older, size, tl.cdiv(older, tl.maximum(size, 1))


@jit
def loaded_splits(
    partial_ptr,
    stats_ptr,
    older,
    first,
    splits,
    head,
    dim,
    in_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEW_SPLITS: tl.constexpr,
):
    """FEW_SPLITS splits of a row and head from the `first` on: highest and total [FEW_SPLITS, 1] and partial
    [FEW_SPLITS, BLOCK_DIM]. Those past the last weigh nothing."""
    at = first + tl.arange(0, FEW_SPLITS)[:, None]
    is_used = at < splits
    stats_at = stats_ptr + (older + at) * (2 * HEADS) + head
    highest = tl.load(stats_at, mask=is_used, other=float("-inf"))
    total = tl.load(stats_at + HEADS, mask=is_used, other=0.0)
    partial_at = partial_ptr + ((older + at) * HEADS + head) * HEAD_DIM + dim[None, :]
    partial = tl.load(partial_at, mask=is_used & in_head[None, :], other=0.0)
    return highest, total, partial


@jit(do_not_specialize=["window", "row_splits"])
def combine_splits_kernel(
    out_ptr,
    partial_ptr,
    stats_ptr,
    position_ptr,
    window,
    row_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    FEW_SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # One program combines all splits of one row and head in BLOCK_DIM dims, FEW_SPLITS of them at once.
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    dim = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    # Before the wait: the position, which nothing before the end of the step changes.
    position = tl.load(position_ptr + row)
    _, _, splits = planned_splits(position, window, FEW_SPLITS, SPLIT_KEYS, MOST_SPLITS, BLOCK_KEYS)
    new = row * row_splits
    in_head = dim < HEAD_DIM
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    highest, total, partial = loaded_splits(
        partial_ptr, stats_ptr, new + 1, 0, splits, head, dim, in_head, HEADS, HEAD_DIM, FEW_SPLITS
    )
    new_highest = tl.load(stats_ptr + new * (2 * HEADS) + head)
    new_total = tl.load(stats_ptr + new * (2 * HEADS) + HEADS + head)
    new_partial = tl.load(partial_ptr + (new * HEADS + head) * HEAD_DIM + dim, mask=in_head, other=0.0)
    most = tl.maximum(new_highest, tl.max(tl.max(highest, axis=1), axis=0))
    weight = tl.exp(highest - most)
    new_weight = tl.exp(new_highest - most)
    sums = new_weight * new_partial + tl.sum(weight * partial, axis=0)
    total = new_weight * new_total + tl.sum(tl.sum(weight * total, axis=1), axis=0)
    for first in range(FEW_SPLITS, splits, FEW_SPLITS):
        highest, more, partial = loaded_splits(
            partial_ptr, stats_ptr, new + 1, first, splits, head, dim, in_head, HEADS, HEAD_DIM, FEW_SPLITS
        )
        raised = tl.maximum(most, tl.max(tl.max(highest, axis=1), axis=0))
        shrink = tl.exp(most - raised)
        weight = tl.exp(highest - raised)
        sums = shrink * sums + tl.sum(weight * partial, axis=0)
        total = shrink * total + tl.sum(tl.sum(weight * more, axis=1), axis=0)
        most = raised
    # The attention's output is a tensor of the model's dtype in Hugging Face.
    tl.store(out_ptr + (row * HEADS + head) * HEAD_DIM + dim, (sums / total).to(out_ptr.dtype.element_ty), mask=in_head)

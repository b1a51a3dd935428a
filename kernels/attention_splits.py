"""The splits of keys that decode_attention spreads a row over, and how output_projection combines them.

    m        = max over splits of highest[split]
    w[split] = total[split] * exp(highest[split] - m)
    combined = d(sum of w[split] * partial[split] / sum of w[split])

highest and total are a split's largest score and its sum of exp(score - highest), partial its softmax over itself times
V; all in fp32, d is the model's dtype. How a row is split follows from its length alone, so its sums do not depend on
what shares the batch, and one compiled kernel and one graph serve every length.

Attention that is not split stores its rounded result in the first split and gives the others no weight, which combines
to the same bits: highest = 0 and total = 1 in the first, highest = -inf and total = 0 in the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from runtime.kernels.checks import check

# Every program of output_projection reads all splits of a row, so they are few.
MAX_SPLITS = 16
# Splits that a program of output_projection loads at once.
SPLITS_AT_ONCE = 4
# Stands for no window.
ALL_KEYS = 2**30


def block_keys(dtype: torch.dtype) -> int:
    """Every split is a multiple of this many keys."""
    return 32 if dtype.itemsize == 2 else 16


class AttentionSplits(NamedTuple):
    """The output of decode_attention before it is combined, the same for every backend."""

    partial: torch.Tensor  # [rows, MAX_SPLITS, heads * head_dim] fp32
    stats: torch.Tensor  # [rows, MAX_SPLITS, 2, heads] fp32: highest and total

    def __repr__(self) -> str:
        return f"AttentionSplits({len(self.partial)} rows, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.partial.device

    @classmethod
    def allocate(cls, rows: int, heads: int, head_dim: int, device: torch.device) -> AttentionSplits:
        """Makes the buffers for `rows` rows."""
        return cls(
            torch.zeros(rows, MAX_SPLITS, heads * head_dim, dtype=torch.float32, device=device),
            torch.zeros(rows, MAX_SPLITS, 2, heads, dtype=torch.float32, device=device),
        )

    def put(self, row: int, result: torch.Tensor) -> None:
        """Stores the attention's output [heads * head_dim] of a row in its first split."""
        self.partial[row, 0] = result
        highest, total = self.stats[row].unbind(1)  # [MAX_SPLITS, heads]
        highest.fill_(-torch.inf)
        total.zero_()
        highest[0], total[0] = 0.0, 1.0


def check_splits(name: str, splits: AttentionSplits, rows: int, width: int, heads: int, like: torch.Tensor) -> None:
    """Checks the splits of `rows` rows of `heads` heads and `width` columns, on the device of `like` and in fp32, or in
    fp64 where its dtype is.

    Raises:
        TypeError, ValueError: not AttentionSplits, or a dtype, shape, device or stride differs.
    """
    if not isinstance(splits, AttentionSplits):
        raise TypeError(f"{name}: expected AttentionSplits, got {type(splits).__name__}")
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    check(f"{name}.partial", splits.partial, (rows, MAX_SPLITS, width), dtype, like.device)
    check(f"{name}.stats", splits.stats, (rows, MAX_SPLITS, 2, heads), dtype, like.device)


def plan_splits(position: int, window: int | None, block_keys: int) -> tuple[int, int, int]:
    """How a row is split: (keys it sees, keys of one split, number of splits)."""
    length = position + 1 if window is None else min(position + 1, window)
    size = triton.cdiv(triton.cdiv(length, MAX_SPLITS), block_keys) * block_keys
    return length, size, triton.cdiv(length, size)


def combine_torch(splits: AttentionSplits, position: torch.Tensor, window: int | None, block_keys: int) -> torch.Tensor:
    """The attention's output [rows, heads * head_dim], in the splits' dtype and not yet rounded to d."""
    rows, _, width = splits.partial.shape
    out = splits.partial.new_empty(rows, width)
    for row, at in enumerate(position.tolist()):
        count = plan_splits(at, window, block_keys)[2]
        highest, total = splits.stats[row, :count].unbind(1)  # [count, heads]
        weight = (total * torch.exp(highest - highest.max(0).values))[:, :, None]
        partial = splits.partial[row, :count].view(count, weight.shape[1], -1).masked_fill(weight == 0, 0)
        out[row] = ((partial * weight).sum(0) / weight.sum(0)).view(-1)
    return out


@triton.jit
def planned_splits(position, window, MAX_SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """How a row is split: (keys it sees, keys of one split, number of splits)."""
    length = tl.minimum(position + 1, window)
    size = tl.cdiv(tl.cdiv(length, MAX_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    return length, size, tl.cdiv(length, size)


@triton.jit
def combined_row(
    partial_ptr,
    stats_ptr,
    row,
    splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One row of the attention's output [BLOCK_HEADS, BLOCK_DIM] in fp32, not yet rounded; lanes past it hold zeros."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    # Finite, so that no difference of two of them is NaN.
    highest = tl.full([BLOCK_HEADS, 1], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_HEADS, 1], tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        # Unrolled, so that all loads are in flight before the first is used. Statistics are held per head, not per
        # column. A split past the last has weight 0: the first one's largest score is far above -3e38.
        for ahead in tl.static_range(SPLITS_AT_ONCE):
            split = first + ahead
            mask = head < tl.where(split < splits, HEADS, 0)
            at = row * MAX_SPLITS + split
            stats = stats_ptr + at * (2 * HEADS) + head
            partial_at = partial_ptr + (at * HEADS + head) * HEAD_DIM + dim  # [BLOCK_HEADS, BLOCK_DIM]
            partial = tl.load(partial_at, mask=mask & (dim < HEAD_DIM), other=0.0)
            split_highest = tl.load(stats, mask=mask, other=-3.0e38)  # [BLOCK_HEADS, 1]
            split_total = tl.load(stats + HEADS, mask=mask, other=1.0)
            raised = tl.maximum(highest, split_highest)
            weight = split_total * tl.exp(split_highest - raised)
            shrink = tl.exp(highest - raised)
            total = total * shrink + weight
            acc = acc * shrink + weight * partial
            highest = raised
    return acc / total

"""The runs of keys that decode_attention cuts a row into, and how output_projection joins what they leave.

    m      = max over runs of highest[run]
    w[run] = total[run] * exp(highest[run] - m)
    joined = d(sum of w[run] * partial[run] / sum of w[run])

highest and total are a run's largest score and its sum of exp(score - highest), partial its softmax over itself times
V; all in fp32, d is the model's dtype. A row is cut by its length alone, so its sums do not depend on what shares the
batch, and one compiled kernel and one graph serve every length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from runtime.kernels.checks import check

# Every program of output_projection reads all parts of a row, so runs are few.
MAX_SPLITS = 16
BLOCK_KEYS = {2: 32, 4: 16}  # a run is a multiple of this, by the size of an element
# Parts that one program of output_projection holds at once.
SPLITS_AT_ONCE = 4
# Stands for no window.
ALL_KEYS = 2**30


class AttentionSplits(NamedTuple):
    """What decode_attention leaves for output_projection: the parts of its runs where kernels run, else the result."""

    partial: torch.Tensor  # [rows, MAX_SPLITS, heads * head_dim] fp32
    stats: torch.Tensor  # [rows, MAX_SPLITS, 2, heads] fp32: highest and total
    joined: torch.Tensor  # [rows, heads * head_dim] d, written by the reference

    def __repr__(self) -> str:
        return f"AttentionSplits({len(self.joined)} rows, {self.joined.dtype}, {self.joined.device})"

    @classmethod
    def allocate(
        cls, rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> AttentionSplits:
        """Makes the buffers for `rows` rows."""
        return cls(
            torch.zeros(rows, MAX_SPLITS, heads * head_dim, dtype=torch.float32, device=device),
            torch.zeros(rows, MAX_SPLITS, 2, heads, dtype=torch.float32, device=device),
            torch.zeros(rows, heads * head_dim, dtype=dtype, device=device),
        )


def check_splits(name: str, parts: AttentionSplits, rows: int, width: int, heads: int, like: torch.Tensor) -> None:
    """Checks the parts of `rows` rows of `heads` heads, [rows, width] joined, of the dtype and on the device of `like`.

    Raises:
        TypeError, ValueError: they are no AttentionSplits, or a dtype, shape, device or stride differs.
    """
    if not isinstance(parts, AttentionSplits):
        raise TypeError(f"{name}: expected AttentionSplits, got {type(parts).__name__}")
    check(f"{name}.joined", parts.joined, (rows, width), like.dtype, like.device)
    check(f"{name}.partial", parts.partial, (rows, MAX_SPLITS, width), torch.float32, like.device)
    check(f"{name}.stats", parts.stats, (rows, MAX_SPLITS, 2, heads), torch.float32, like.device)


def plan_splits(position: int, window: int | None, block_keys: int) -> tuple[int, int, int]:
    """How a row is cut: (keys it sees, keys of one run, number of runs)."""
    length = position + 1 if window is None else min(position + 1, window)
    run = triton.cdiv(triton.cdiv(length, MAX_SPLITS), block_keys) * block_keys
    return length, run, triton.cdiv(length, run)


def combine_torch(parts: AttentionSplits, position: torch.Tensor, window: int | None) -> torch.Tensor:
    """The attention's output [rows, heads * head_dim] from its runs, in the parts' dtype and not yet rounded to d."""
    rows, width = parts.joined.shape
    out = torch.empty(rows, width, dtype=parts.partial.dtype, device=parts.partial.device)
    for row, at in enumerate(position.tolist()):
        runs = plan_splits(at, window, BLOCK_KEYS[parts.joined.dtype.itemsize])[2]
        highest, total = parts.stats[row, :runs].unbind(1)  # [runs, heads]
        weight = total * torch.exp(highest - highest.max(0).values)
        partial = parts.partial[row, :runs].view(runs, weight.shape[1], -1)
        out[row] = ((partial * weight[:, :, None]).sum(0) / weight.sum(0)[:, None]).view(-1)
    return out


@triton.jit
def planned_splits(position, window, MAX_SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """How a row is cut: (keys it sees, keys of one run, number of runs)."""
    length = tl.minimum(position + 1, window)
    run = tl.cdiv(tl.cdiv(length, MAX_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    return length, run, tl.cdiv(length, run)


@triton.jit
def combined_row(
    partial_ptr,
    stats_ptr,
    row,
    runs,
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
    mixed = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    for first in range(0, runs, SPLITS_AT_ONCE):
        # Unrolled: the loads of all of them are under way before the first is used. A statistic is held once for its
        # whole head, not once for each column. A run that is not there has no weight beside the first, which is.
        for ahead in tl.static_range(SPLITS_AT_ONCE):
            run = first + ahead
            mask = head < tl.where(run < runs, HEADS, 0)
            at = row * MAX_SPLITS + run
            stats = stats_ptr + at * (2 * HEADS) + head
            partial_at = partial_ptr + (at * HEADS + head) * HEAD_DIM + dim  # [BLOCK_HEADS, BLOCK_DIM]
            partial = tl.load(partial_at, mask=mask & (dim < HEAD_DIM), other=0.0)
            run_highest = tl.load(stats, mask=mask, other=-3.0e38)  # [BLOCK_HEADS, 1]
            run_total = tl.load(stats + HEADS, mask=mask, other=1.0)
            raised = tl.maximum(highest, run_highest)
            weight = run_total * tl.exp(run_highest - raised)
            shrink = tl.exp(highest - raised)
            total = total * shrink + weight
            mixed = mixed * shrink + weight * partial
            highest = raised
    return mixed / total

"""Moves new keys and values of one sequence into the caches of all layers.

    for each buffer, and each of the first `count` rows: cache[row, :, position % slots] = new[row of the step]

sequence_attention leaves them outside the cache while it is not known which of its rows stay. Bytes moved: what is
stored, 4 * layers * kv_heads * head_dim * count * sizeof(d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from runtime.kernels.checks import check
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import Operation
from runtime.kernels.triton_function import jit, next_power_of_2, tl


class Buffer(NamedTuple):
    """A layer's keys or values: where they are, in elements of the memory that they are part of, and their shape."""

    cache: int  # where [batch, kv_heads, slots, head_dim] begins
    new: int  # where [rows of a step, kv_heads, head_dim] begins
    kv_heads: int
    slots: int
    head_dim: int


def store_keys_torch(op: StoreKeys) -> None:
    """Buffer by buffer, row by row."""
    count, row, first = int(op.count), int(op.row), int(op.position[0])
    for numbers in op.buffers.tolist():
        at = Buffer(*numbers)
        size = at.kv_heads * at.slots * at.head_dim
        cache = op.cache[at.cache + row * size :][:size].view(at.kv_heads, at.slots, at.head_dim)
        new = op.new[at.new :][: count * at.kv_heads * at.head_dim].view(count, at.kv_heads, at.head_dim)
        for place in range(count):
            cache[:, (first + place) % at.slots] = new[place]


@jit
def store_keys_kernel(
    cache_ptr,
    new_ptr,
    buffers_ptr,
    position_ptr,
    row_ptr,
    count_ptr,
    FIELDS: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program stores all heads of one row in one buffer.
    place = tl.program_id(1)
    buffer_ptr = buffers_ptr + tl.program_id(0) * FIELDS
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    if place < tl.load(count_ptr):
        cache = tl.load(buffer_ptr)
        new = tl.load(buffer_ptr + 1)
        kv_heads = tl.load(buffer_ptr + 2)
        slots = tl.load(buffer_ptr + 3)
        head_dim = tl.load(buffer_ptr + 4)
        column = tl.arange(0, BLOCK_WIDTH)
        head = column // head_dim
        mask = head < kv_heads
        slot = (tl.load(position_ptr) + place) % slots
        cache_head = (tl.load(row_ptr) * kv_heads + head) * slots + slot
        values = tl.load(new_ptr + new + place * kv_heads * head_dim + column, mask=mask, other=0.0)
        tl.store(cache_ptr + cache + cache_head * head_dim + column % head_dim, values, mask=mask)


@dataclass(frozen=True, eq=False, repr=False)
class StoreKeys(Operation):
    """Stores the keys and values of a step's first rows, successive positions of one sequence, in all layers.

    Args:
        cache: [elements], the memory of all layers' caches, in whose buffers one sequence's slots are written.
        new: [elements], the memory of the keys and values to store.
        buffers: [n, 5] int64, a Buffer in each row.
        position: [rows] int32; the first is the position of the first row.
        row: [1] int64, the sequence.
        count: [1] int64, how many rows are stored, 0 to `rows`; no more than a buffer has slots.
        width: kv_heads * head_dim of the widest buffer.
    """

    name = "store_keys"

    cache: torch.Tensor
    new: torch.Tensor
    buffers: torch.Tensor
    position: torch.Tensor
    row: torch.Tensor
    count: torch.Tensor
    width: int

    def check(self) -> None:
        dtype, device = self.cache.dtype, self.cache.device
        check("cache", self.cache, (self.cache.numel(),), dtype, device)
        check("new", self.new, (self.new.numel(),), dtype, device)
        check("buffers", self.buffers, (len(self.buffers), len(Buffer._fields)), torch.int64, device)
        check("position", self.position, (len(self.position),), torch.int32, device)
        check("row", self.row, (1,), torch.int64, device)
        check("count", self.count, (1,), torch.int64, device)

    def run_torch(self) -> None:
        store_keys_torch(self)

    def run_triton(self, launch: Launcher) -> None:
        launch(
            store_keys_kernel,
            self,
            (len(self.buffers), len(self.position)),
            warps=4,
            FIELDS=len(Buffer._fields),
            BLOCK_WIDTH=next_power_of_2(self.width),
        )

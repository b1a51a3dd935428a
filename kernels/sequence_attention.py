"""Attention of rows that are successive positions of one sequence: a short chunk of a prompt, or guessed tokens.

    for each row in turn: what decode_attention computes at its position, the rows before it being cached

with the same bits: a row's result does not depend on how many rows share a call. The new keys go to the cache, or to
buffers of their own: in a sliding layer they would overwrite keys that must still be seen if a guess turns out wrong,
so store_keys stores the accepted ones later. The compiled CPU kernel does the former. Triton does the latter, with
decode_attention's own kernels, launching group_attention_kernel twice: for the new keys, and then for the older ones.
Plain PyTorch takes one row after another. Bytes moved: the sequence's keys and values, 2 * kv_heads * head_dim * keys *
sizeof(d), on a CPU once for a few rows, on a GPU once for each row, most of them from the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from runtime.kernels.attention_splits import GROUP_ROWS
from runtime.kernels.checks import check, check_rows, check_units
from runtime.kernels.decode_attention import DecodeAttention, decode_attention_torch
from runtime.kernels.launch import Launcher
from runtime.kernels.operation import NumbaCall


def sequence_attention_torch(op: SequenceAttention) -> None:
    """Position by position, each as one step; in a copy of the sequence's cache where the cache must not be written."""
    row = slice(int(op.row), int(op.row) + 1)
    k_cache, v_cache = op.k_cache[row], op.v_cache[row]
    if op.new_keys is not None:
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
    for place in range(len(op.qkv)):
        own = slice(place, place + 1)
        decode_attention_torch(
            DecodeAttention(
                op.out[own],
                k_cache,
                v_cache,
                op.qkv[own],
                op.position[own],
                op.cos,
                op.sin,
                q_norm=op.q_norm,
                k_norm=op.k_norm,
                heads=op.heads,
                window=op.window,
                scale=op.scale,
                eps=op.eps,
                softcap=op.softcap,
            )
        )
        if op.new_keys is not None and op.new_values is not None:
            slot = int(op.position[place]) % k_cache.shape[2]
            op.new_keys[place], op.new_values[place] = k_cache[0, :, slot], v_cache[0, :, slot]


@dataclass(frozen=True, eq=False, repr=False)
class SequenceAttention(DecodeAttention):
    """Attends, for each row, to what it may see of one sequence: its cache, the new keys of the rows before and its
    own.

    Args:
        row: [1] int64, the sequence.
        position: [rows] int32, successive; the first is the number of tokens already cached. Where new_keys are given,
            the last positions may repeat one, and the results of those rows mean nothing.
        k_cache, v_cache: [at least one, kv_heads, slots, head_dim]; the slots of these positions are written in the
            order of the rows, unless new_keys are given.
        new_keys, new_values: [rows, kv_heads, head_dim], written in place of the cache; both or neither. Triton needs
            them, and takes at most GROUP_ROWS query heads for a key head; the compiled CPU kernel takes none.

    The others are as in decode_attention.
    """

    name = "sequence_attention"

    row: torch.Tensor = field(kw_only=True)
    new_keys: torch.Tensor | None = field(kw_only=True, default=None)
    new_values: torch.Tensor | None = field(kw_only=True, default=None)

    def check(self) -> None:
        rows, width = check_rows("qkv", self.qkv)
        self._check_all(rows, width, 1)
        check("row", self.row, (1,), torch.int64, self.qkv.device)
        if (self.new_keys is None) != (self.new_values is None):
            raise ValueError("new_keys and new_values: expected both or neither, got one")
        if self.new_keys is not None:
            _, kv_heads, _, head_dim = self.k_cache.shape
            for name, new in (("new_keys", self.new_keys), ("new_values", self.new_values)):
                check(name, new, (rows, kv_heads, head_dim), self.qkv.dtype, self.qkv.device)

    def run_torch(self) -> None:
        sequence_attention_torch(self)

    def run_numba(self, call: NumbaCall) -> None:
        if self.new_keys is not None:
            raise ValueError("new_keys: expected None for compiled kernels, which write the cache, got a tensor")
        rows, (_, kv_heads, _, head_dim) = len(self.qkv), self.k_cache.shape
        check_units(rows, kv_heads)
        call(
            self,
            queries=call.scratch(kv_heads, rows, self.heads // kv_heads, head_dim),
            new_keys=call.scratch(2, kv_heads, rows, head_dim, dtype=self.qkv.dtype)[0],
            new_values=call.scratch(2, kv_heads, rows, head_dim, dtype=self.qkv.dtype)[1],
            window=self.keys,
        )

    def run_triton(self, launch: Launcher) -> None:
        if launch.max_rows == 1:
            raise ValueError("max_rows: expected 2 or more for rows of a sequence, got 1: it has kernels of its own")
        if self.heads_of_key > GROUP_ROWS:
            raise ValueError(f"heads: expected at most {GROUP_ROWS} for a key head, got {self.heads_of_key}")
        if self.new_keys is None:
            raise ValueError("new_keys: expected a tensor for Triton, which leaves the cache as it is, got None")
        planned, older = self._planned(launch.max_rows)
        sequence = {"new_keys_ptr": self.new_keys, "new_values_ptr": self.new_values, "row_ptr": self.row}
        for splits in (range(1), range(1, 1 + older)):
            if splits:
                self._launch_groups(launch, planned, splits, **sequence)
        self._launch_combine(launch, planned)

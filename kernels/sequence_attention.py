"""Attention of rows that are successive positions of one sequence: a short chunk of a prompt, or guessed tokens.

    for each row in turn: what decode_attention computes at its position, the rows before it being cached

and with its bits: a row does not depend on how many rows share a call. Compiled for CPUs; plain PyTorch takes one row
after another. Bytes moved: keys and values of the sequence once for a few rows, 2 * kv_heads * head_dim * keys *
sizeof(d).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from runtime.kernels.checks import check, check_rows, check_units
from runtime.kernels.decode_attention import DecodeAttention, decode_attention_torch
from runtime.kernels.launch import Launcher
from runtime.kernels.operation import NumbaCall


def sequence_attention_torch(op: SequenceAttention) -> None:
    """Position by position, each as one step."""
    row = slice(int(op.row), int(op.row) + 1)
    for place in range(len(op.qkv)):
        own = slice(place, place + 1)
        decode_attention_torch(
            DecodeAttention(
                op.out[own],
                op.k_cache[row],
                op.v_cache[row],
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


@dataclass(frozen=True, eq=False, repr=False)
class SequenceAttention(DecodeAttention):
    """Adds the rows' new keys and values to one sequence's cache; each row attends to what it may see of it, the new
    keys of the rows before it and its own included.

    Args:
        row: [1] int64, the sequence.
        position: [rows] int32, successive; the first is the number of tokens already cached.
        k_cache, v_cache: [at least one, kv_heads, slots, head_dim]; the slots of these positions are written, in the
            order of the rows.

    The others are as in decode_attention.
    """

    name = "sequence_attention"

    row: torch.Tensor = field(kw_only=True)

    def check(self) -> None:
        self._check_all(*check_rows("qkv", self.qkv), 1)
        check("row", self.row, (1,), torch.int64, self.qkv.device)

    def run_torch(self) -> None:
        sequence_attention_torch(self)

    def run_numba(self, call: NumbaCall) -> None:
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
        raise NotImplementedError(f"{self.name} has no Triton kernel")

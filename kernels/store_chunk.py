"""Stores a chunk's keys and values in the slots of its row's cache, after the chunk has attended to what they replace.

    cache[row, :, (start + i) % slots] = k[i], v[i]     for the last min(count, slots) of the chunk's real tokens

Row, start and count are read from the device, so that one CUDA graph serves every prompt. Padding is not stored.
Bytes moved: 2 * kv_heads * head_dim * sizeof(d) per token, twice.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from runtime.kernels.checks import check_cache, check_chunk
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import Operation
from runtime.kernels.triton_function import cdiv, jit, next_power_of_2, tl

BLOCK_TOKENS, WARPS = 8, 4  # of one program


def store_chunk_torch(op: StoreChunk) -> None:
    """Every real token that a later one does not replace."""
    row, start, count = op.chunk.tolist()
    _, kv_heads, slots, head_dim = op.k_cache.shape
    tokens = torch.arange(max(0, count - slots), count, device=op.qkv.device)
    own = op.qkv.view(len(op.qkv), -1, head_dim)[tokens, -2 * kv_heads :]
    for cache, heads in zip((op.k_cache, op.v_cache), own.split(kv_heads, dim=1), strict=True):
        cache[row, :, (start + tokens) % slots] = heads.transpose(0, 1)


@jit(do_not_specialize=["slots"])
def store_chunk_kernel(
    k_cache_ptr,
    v_cache_ptr,
    qkv_ptr,
    chunk_ptr,
    slots,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # One program stores one key head, its keys and its values, of BLOCK_TOKENS tokens.
    TOKEN_WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    kv_head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_DIM)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    row = tl.load(chunk_ptr)
    start = tl.load(chunk_ptr + 1).to(tl.int32)
    count = tl.load(chunk_ptr + 2).to(tl.int32)
    # Of a chunk longer than the ring only the last tokens stay: a slot is written once.
    mask = ((token < count) & (token >= count - slots))[:, None] & (dim < HEAD_DIM)[None, :]
    k_at = qkv_ptr + token.to(tl.int64)[:, None] * TOKEN_WIDTH + (HEADS + kv_head) * HEAD_DIM + dim[None, :]
    slot = (start + token) % slots
    cache_at = (row * KV_HEADS + kv_head) * slots * HEAD_DIM + slot[:, None] * HEAD_DIM + dim[None, :]
    k = tl.load(k_at, mask=mask, other=0.0)  # [BLOCK_TOKENS, BLOCK_DIM]
    v = tl.load(k_at + KV_HEADS * HEAD_DIM, mask=mask, other=0.0)
    tl.store(k_cache_ptr + cache_at, k, mask=mask)
    tl.store(v_cache_ptr + cache_at, v, mask=mask)


@dataclass(frozen=True, eq=False, repr=False)
class StoreChunk(Operation):
    """Stores a chunk's keys and values.

    Args:
        k_cache, v_cache: [batch, kv_heads, slots, head_dim]; slot position % slots of the row is written.
        qkv: [seq, (heads + 2 * kv_heads) * head_dim], keys after their norm and rotary embedding.
        chunk: [3] int64: row, start and count; the first `count` tokens have positions from `start` on.
        heads: query heads.
    """

    name = "store_chunk"

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    qkv: torch.Tensor
    chunk: torch.Tensor
    _: KW_ONLY
    heads: int

    def check(self) -> None:
        check_cache(self.k_cache, self.v_cache, self.qkv)
        _, kv_heads, _, head_dim = self.k_cache.shape
        check_chunk(self.qkv, self.chunk, self.heads, kv_heads, head_dim)

    def run_torch(self) -> None:
        store_chunk_torch(self)

    def run_triton(self, launch: Launcher) -> None:
        _, kv_heads, slots, head_dim = self.k_cache.shape
        launch(
            store_chunk_kernel,
            self,
            (cdiv(len(self.qkv), BLOCK_TOKENS), kv_heads),
            WARPS,
            slots=slots,
            HEADS=self.heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_DIM=next_power_of_2(head_dim),
        )

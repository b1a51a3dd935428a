"""Attention of a chunk of a prompt over itself and over the cached tokens before it.

    out = softmax(scale * q K^T) V, each query over the last `window` keys up to its own

Older keys and values are read in place, from the slots of the row's cache; the chunk's own from its packed projection,
after their rotary embedding. They are stored in the cache afterwards (store_chunk.py), since in a sliding layer they
replace keys that the chunk's first queries still see. Row, start and count are read from the device, so that one CUDA
graph serves every prompt of a padded length; padding attends as the last real token does, and nothing sees it.

d is the model's dtype. Gemma 1 and 3 keep scores in fp32. Gemma 2 caps them and rounds at every step: QK^T -> d,
* scale -> d, / cap -> d, tanh -> d, * cap -> d, softmax in fp32 -> d, . V -> d. Query head h reads key head
h // (heads / kv_heads). Keys are taken in blocks, starting at the oldest that a program's first query sees, which
depends on positions alone; the blocks' sums are kept in fp32 with a running maximum.
Bytes moved: the visible keys and values, 2 * kv_heads * head_dim * keys * sizeof(d), once for each block of queries.
Source: sdpa_attention_forward and eager_attention_forward in transformers.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch

from runtime.kernels.attention import attention_torch, history
from runtime.kernels.checks import check, check_cache, check_chunk
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import Operation
from runtime.kernels.softcap import finished_scores
from runtime.kernels.triton_function import cdiv, jit, next_power_of_2, tl


class ChunkBlock(NamedTuple):
    """What one program of chunk_attention takes at once."""

    rows: int  # queries
    keys: int
    warps: int
    stages: int


PROGRAMS = 128  # wanted of each launch, about as many as a large GPU has multiprocessors


def chunk_block(queries: int, dtype: torch.dtype) -> ChunkBlock:
    """The block for a chunk with this many queries over all heads, the same on every GPU: more rows read keys for more
    queries at once, fewer make more programs. With 64 rows of 256 dimensions, four warps would spill."""
    if dtype.itemsize == 4:
        return ChunkBlock(16, 16, 4, 1)
    return ChunkBlock(32 if queries >= 32 * PROGRAMS else 16, 32, 4, 2)


def chunk_attention_torch(op: ChunkAttention) -> None:
    """All queries at once, over the keys that any of them sees, oldest first."""
    row, start, count = op.chunk.tolist()
    _, kv_heads, slots, head_dim = op.k_cache.shape
    seq, window = len(op.qkv), op.window or slots
    past = min(start, window - 1)
    heads = op.qkv.view(seq, -1, head_dim).transpose(0, 1)
    q, k, v = heads.split((op.heads, kv_heads, kv_heads))
    keys, values = (
        torch.cat((history(cache[row : row + 1], start, past), own[None, :, :count]), dim=2)
        for cache, own in ((op.k_cache, k), (op.v_cache, v))
    )
    query = start + torch.arange(seq, device=q.device).clamp(max=count - 1)[:, None]
    key = torch.arange(start - past, start + count, device=q.device)
    mask = (key <= query) & (key > query - window)
    op.out.copy_(attention_torch(q[None], keys, values, scale=op.scale, mask=mask[None, None], softcap=op.softcap)[0])


@jit
def attended(
    q,
    k,
    v,
    seen,
    highest,
    total,
    acc,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
):
    """The running maximum, sum of weights and output of queries after one more block of keys, of which each query sees
    some or none."""
    dtype: tl.constexpr = v.dtype
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_ROWS, BLOCK_KEYS]
    scores = tl.where(seen, finished_scores(scores, scale, softcap, HAS_SOFTCAP, dtype), float("-inf"))
    raised = tl.maximum(highest, tl.max(scores, axis=1))
    # A query that has not seen any key has no maximum yet.
    base = tl.where(raised == float("-inf"), 0.0, raised)
    shrink = tl.exp(highest - base)
    weights = tl.exp(scores - base[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(dtype), v, acc * shrink[:, None], input_precision="ieee")
    return raised, total, acc


@jit(do_not_specialize=["seq", "slots", "window"])
def chunk_attention_kernel(
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    qkv_ptr,
    chunk_ptr,
    seq,
    slots,
    window,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):
    # One program takes BLOCK_ROWS queries of one key head, those of a token side by side, over all keys that they see.
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKEN_WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    kv_head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_ROWS
    at = first + tl.arange(0, BLOCK_ROWS)
    token, head = at // GROUP, kv_head * GROUP + at % GROUP
    keys, dim = tl.arange(0, BLOCK_KEYS), tl.arange(0, BLOCK_DIM)
    in_head = (dim < HEAD_DIM)[None, :]
    in_chunk = (token < seq)[:, None] & in_head
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)

    row = tl.load(chunk_ptr)
    start = tl.load(chunk_ptr + 1).to(tl.int32)
    count = tl.load(chunk_ptr + 2).to(tl.int32)
    # Padding sees what the last real token sees.
    place = tl.minimum(token, count - 1)
    oldest = tl.minimum(first // GROUP, count - 1) - window + 1  # counted from the chunk's first token
    end = tl.minimum((first + BLOCK_ROWS - 1) // GROUP, count - 1) + 1
    q_at = qkv_ptr + (token.to(tl.int64) * TOKEN_WIDTH + head * HEAD_DIM)[:, None] + dim[None, :]
    q = tl.load(q_at, mask=in_chunk, other=0.0)  # [BLOCK_ROWS, BLOCK_DIM]

    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    cache_row = (row * KV_HEADS + kv_head) * slots * HEAD_DIM
    for begin in tl.range(tl.maximum(start + oldest, 0), start, BLOCK_KEYS, num_stages=STAGES):
        position = begin + keys
        is_older = position < start
        key_at = cache_row + (position % slots)[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(k_cache_ptr + key_at, mask=is_older[:, None] & in_head, other=0.0)  # [BLOCK_KEYS, BLOCK_DIM]
        v = tl.load(v_cache_ptr + key_at, mask=is_older[:, None] & in_head, other=0.0)
        seen = is_older[None, :] & (position[None, :] > (start + place - window)[:, None])
        highest, total, acc = attended(q, k, v, seen, highest, total, acc, scale, softcap, HAS_SOFTCAP)
    own_ptr = qkv_ptr + (HEADS + kv_head) * HEAD_DIM
    for begin in tl.range(tl.maximum(oldest, 0), end, BLOCK_KEYS, num_stages=STAGES):
        own = begin + keys
        # Padding may hold anything, NaN included, which a weight of zero would let through.
        is_there = (own < end)[:, None] & in_head
        own_at = own_ptr + own.to(tl.int64)[:, None] * TOKEN_WIDTH + dim[None, :]
        k = tl.load(own_at, mask=is_there, other=0.0)
        v = tl.load(own_at + KV_HEADS * HEAD_DIM, mask=is_there, other=0.0)
        seen = (own[None, :] <= place[:, None]) & (own[None, :] > (place - window)[:, None])
        highest, total, acc = attended(q, k, v, seen, highest, total, acc, scale, softcap, HAS_SOFTCAP)
    out_at = out_ptr + (token.to(tl.int64) * HEADS * HEAD_DIM + head * HEAD_DIM)[:, None] + dim[None, :]
    # The attention's output is a tensor of the model's dtype in Hugging Face.
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_chunk)


@dataclass(frozen=True, eq=False, repr=False)
class ChunkAttention(Operation):
    """Attends to a chunk's own keys and to those cached before it.

    Args:
        out: [seq, heads * head_dim], written; padding's rows are written and mean nothing.
        k_cache, v_cache: [batch, kv_heads, slots, head_dim]; position p before the chunk is in slot p % slots.
        qkv: [seq, (heads + 2 * kv_heads) * head_dim], queries and keys after their norms and rotary embedding.
        chunk: [3] int64: row, start and count; the first `count` tokens, 1 to seq, have positions from `start` on.
        heads: query heads, a multiple of kv_heads.
        window: keys that a query sees, its own included; all those before the chunk must still be in their slots. None
            for all.
        scale: multiplies QK^T.
        softcap: Gemma 2's cap on scores; None for none.
    """

    name = "chunk_attention"

    out: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    qkv: torch.Tensor
    chunk: torch.Tensor
    _: KW_ONLY
    heads: int
    window: int | None = None
    scale: float
    softcap: float | None = None

    def check(self) -> None:
        check_cache(self.k_cache, self.v_cache, self.qkv)
        _, kv_heads, _, head_dim = self.k_cache.shape
        check_chunk(self.qkv, self.chunk, self.heads, kv_heads, head_dim)
        check("out", self.out, (len(self.qkv), self.heads * head_dim), self.qkv.dtype, self.qkv.device)

    def run_torch(self) -> None:
        chunk_attention_torch(self)

    def run_triton(self, launch: Launcher) -> None:
        _, kv_heads, slots, head_dim = self.k_cache.shape
        seq, heads = len(self.qkv), self.heads
        block = chunk_block(seq * heads, self.qkv.dtype)
        launch(
            chunk_attention_kernel,
            self,
            (cdiv(seq * heads // kv_heads, block.rows), kv_heads),
            block.warps,
            two_programs=True,  # else some compilers spill in fp32 to fit more programs than shared memory has room for
            seq=seq,
            slots=slots,
            window=self.window or slots,
            softcap=self.softcap or 1.0,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            HAS_SOFTCAP=self.softcap is not None,
            BLOCK_ROWS=block.rows,
            BLOCK_KEYS=block.keys,
            BLOCK_DIM=max(16, next_power_of_2(head_dim)),
            STAGES=block.stages,
        )

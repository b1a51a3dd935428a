"""The norms of Gemma 3 and the rotary embedding of a chunk's queries and keys, in place in their packed projection.

    q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)                          Gemma 3
    q, k = rotary at the token's position: d(d(x * cos) + d(rotate_half(x) * sin))

d is the model's dtype. Row, start and count of the chunk are read from the device, so that one CUDA graph serves every
prompt; padding takes the last real token's position, since its own may be past the tables' end.
Bytes moved: (heads + kv_heads) * head_dim * sizeof(d) per token, twice. Source: Gemma3Attention in transformers.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from runtime.kernels.checks import check_chunk, check_rotary
from runtime.kernels.group_attention import normed_halves
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import Operation
from runtime.kernels.rms_norm import rms_norm_torch
from runtime.kernels.rotary import rotary_torch, rotated_halves
from runtime.kernels.triton_function import cdiv, jit, next_power_of_2, tl

BLOCK_ROWS, WARPS = 8, 4  # heads of one program


def rotate_heads_torch(op: RotateHeads) -> None:
    """All heads of all tokens at once."""
    _, start, count = op.chunk
    place = torch.minimum(torch.arange(len(op.qkv), device=op.device), count - 1)
    cos, sin = (table.index_select(0, start + place)[:, None] for table in (op.cos, op.sin))
    states = op.qkv.view(len(op.qkv), -1, op.head_dim)
    for heads, norm in ((states[:, : op.heads], op.q_norm), (states[:, op.heads :][:, : op.kv_heads], op.k_norm)):
        normed = heads if norm is None else rms_norm_torch(heads, norm, op.eps)
        heads.copy_(rotary_torch(normed, cos, sin))


@jit
def rotate_part(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    norm_ptr,
    start,
    count,
    seq,
    eps,
    FIRST: tl.constexpr,
    PART_HEADS: tl.constexpr,
    TOKEN_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Norms and rotates BLOCK_ROWS of the tokens' PART_HEADS heads from head FIRST on."""
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    at = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token, head = at // PART_HEADS, FIRST + at % PART_HEADS
    half = tl.arange(0, BLOCK_HALF)
    mask = (token < seq)[:, None] & (half < HALF_DIM)[None, :]
    first_at = qkv_ptr + (token.to(tl.int64) * TOKEN_WIDTH + head * HEAD_DIM)[:, None] + half[None, :]
    angle_at = (start + tl.minimum(token, count - 1))[:, None] * HALF_DIM + half[None, :]
    cos = tl.load(cos_ptr + angle_at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle_at, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(first_at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_HALF]
    second = tl.load(first_at + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
    if HAS_QK_NORM:
        first, second = normed_halves(first, second, norm_ptr, half, HALF_DIM, eps, dtype)
    first, second = rotated_halves(first, second, cos, sin, dtype)
    tl.store(first_at, first, mask=mask)
    tl.store(first_at + HALF_DIM, second, mask=mask)


@jit(do_not_specialize=["seq"])
def rotate_heads_kernel(
    qkv_ptr,
    chunk_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    seq,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    # One program norms and rotates BLOCK_ROWS query heads, or as many key heads, of successive tokens.
    TOKEN_WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    start = tl.load(chunk_ptr + 1).to(tl.int32)
    count = tl.load(chunk_ptr + 2).to(tl.int32)
    if tl.program_id(1) == 0:
        rotate_part(
            qkv_ptr,
            cos_ptr,
            sin_ptr,
            q_norm_ptr,
            start,
            count,
            seq,
            eps,
            0,
            HEADS,
            TOKEN_WIDTH,
            HEAD_DIM,
            HAS_QK_NORM,
            BLOCK_ROWS,
            BLOCK_HALF,
        )
    else:
        rotate_part(
            qkv_ptr,
            cos_ptr,
            sin_ptr,
            k_norm_ptr,
            start,
            count,
            seq,
            eps,
            HEADS,
            KV_HEADS,
            TOKEN_WIDTH,
            HEAD_DIM,
            HAS_QK_NORM,
            BLOCK_ROWS,
            BLOCK_HALF,
        )


@dataclass(frozen=True, eq=False, repr=False)
class RotateHeads(Operation):
    """Norms and rotates a chunk's queries and keys.

    Args:
        qkv: [seq, (heads + 2 * kv_heads) * head_dim], whose queries and keys are overwritten.
        chunk: [3] int64: row, start and count; the first `count` tokens have positions from `start` on.
        cos, sin: [max_seq_len, head_dim / 2], the rotary tables of this layer.
        q_norm, k_norm: [head_dim] (multiplier 1 + weight), both or neither.
        heads, kv_heads: how many.
        eps: of the norms.
    """

    name = "rotate_heads"

    qkv: torch.Tensor
    chunk: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    _: KW_ONLY
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    heads: int
    kv_heads: int
    eps: float = 0.0

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return 2 * self.cos.shape[1]

    def check(self) -> None:
        check_chunk(self.qkv, self.chunk, self.heads, self.kv_heads, self.head_dim)
        check_rotary(self.cos, self.sin, self.q_norm, self.k_norm, self.head_dim, self.qkv)

    def run_torch(self) -> None:
        rotate_heads_torch(self)

    def run_triton(self, launch: Launcher) -> None:
        seq = len(self.qkv)
        launch(
            rotate_heads_kernel,
            self,
            (cdiv(seq * self.heads, BLOCK_ROWS), 2),
            WARPS,
            seq=seq,
            HEADS=self.heads,
            KV_HEADS=self.kv_heads,
            HEAD_DIM=self.head_dim,
            HAS_QK_NORM=self.q_norm is not None,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_HALF=next_power_of_2(self.head_dim // 2),
        )

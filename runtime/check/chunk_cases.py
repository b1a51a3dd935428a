"""The inputs of the kernels of a prompt's chunk. Padding is NaN, and so is every cache slot that no token may see."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from runtime.check.attention_cases import FUSED, gpu_slack
from runtime.check.case import EPS, Case, Results, random
from runtime.check.integer_cases import near
from runtime.kernels.ops import Ops
from runtime.kernels.scaled_matrix import ScaledMatrix

BATCH, ROW = 3, 2  # rows of the cache, and the chunk's


class ChunkCase(Case):
    """A chunk, of whose results only those of real tokens are compared."""

    def run(self, function, rows=slice(None), dtype=None, device=None, **changed) -> Results:
        results = super().run(function, rows, dtype, device, **changed)
        count = int(self.inputs["chunk"][2])
        if "qkv" in results:  # rotated in place: queries and keys, and what has to stay as it is
            qkv = results.pop("qkv")[:count]
            values = self.options["kv_heads"] * self.inputs["cos"].shape[1] * 2
            results |= {"heads": qkv[:, :-values], "values": qkv[:, -values:]}
        return {name: result if "cache" in name else result[:count] for name, result in results.items()}


def residual_norm_case(rows: int, width: int, dtype: torch.dtype, branched: bool, branch_norm: bool) -> Case:
    inputs = {
        "x": random(rows, width, dtype=dtype),
        "norm_weight": random(width, dtype=dtype, scale=0.1),
        "branch": random(rows, width, dtype=dtype) if branched else None,
        "branch_norm": random(width, dtype=dtype, scale=0.1) if branch_norm else None,
    }

    def call(ops, normed_out, residual_out=None, **arguments):
        ops.residual_norm(normed_out, residual_out, **arguments)

    outputs = {"normed_out": (width,)} | ({"residual_out": (width,)} if branched else {})
    return Case(call, inputs, outputs, rows, dtype, options={"eps": EPS})


def gated_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    """Gates where tanh's GELU and the exact one differ by several per cent."""
    gate_up = random(rows, 2 * width, dtype=dtype)
    gate_up[:, :width] = torch.linspace(-4.6, -1.2, width).to(dtype)
    return Case(Ops.gated_product, {"gate_up": gate_up}, {"out": (width,)}, rows, dtype)


def dequantize_case(outputs: int, width: int, form: str, dtype: torch.dtype) -> Case:
    """A matrix of integers with scales, whose values are the reference's to the bit."""
    matrix = near(torch.randn(outputs, width), form)

    def call(ops: Ops, out: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
        # Cases cast what is in floating point for their fp64 truth; int8's scales are fp32.
        ops.dequantize(out, ScaledMatrix(q, scale.float() if scale.is_floating_point() else scale))

    inputs = {"q": matrix.q, "scale": matrix.scale}
    return Case(call, inputs, {"out": (width,)}, outputs, dtype, exact=("out",))


def packed(seq: int, count: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, spread: float):
    """Queries, keys and values of a chunk; spread is that of queries and keys."""
    qkv = torch.randn(seq, heads + 2 * kv_heads, head_dim)
    qkv[:, : heads + kv_heads] *= spread
    qkv[count:] = torch.nan
    return qkv.flatten(1).to(dtype)


def place(start: int, count: int) -> torch.Tensor:
    return torch.tensor([ROW, start, count])


def rotate_case(
    heads: int, kv_heads: int, head_dim: int, start: int, count: int, seq: int, dtype: torch.dtype, qk_norm: bool
) -> ChunkCase:
    angles = torch.rand(start + count, head_dim // 2) * 6  # padding's positions are past the end
    inputs = {
        "qkv": packed(seq, count, heads, kv_heads, head_dim, dtype, 1.0),
        "chunk": place(start, count),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
    }
    if qk_norm:
        inputs |= {name: random(head_dim, dtype=dtype, scale=0.1) for name in ("q_norm", "k_norm")}
    options = {"heads": heads, "kv_heads": kv_heads, "eps": EPS}
    # Three roundings to 16 bits hide what a fused multiply-add does to fp32; a norm's sum may move a rounding.
    exact = ("values", "heads") if dtype.itemsize == 2 and not qk_norm else ("values",)
    return ChunkCase(Ops.rotate_heads, inputs, {}, seq, dtype, ("qkv",), exact, options=options)


def chunk_attention_case(
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    start: int,
    count: int,
    seq: int,
    dtype: torch.dtype,
    *,
    softcap: float | None = None,
    scale: float | None = None,
    spread: float = 1.0,
    spare_slots: int = 0,
) -> ChunkCase:
    """`spare_slots` are those of a cache that is longer than it has to be."""
    slots = (window or start + count) + spare_slots
    caches = [torch.full((BATCH, kv_heads, slots, head_dim), torch.nan) for _ in "kv"]
    for position in range(max(0, start - (window or start) + 1 if window else 0), start):
        for cache, by in zip(caches, (spread, 1.0), strict=True):
            cache[ROW, :, position % slots] = torch.randn(kv_heads, head_dim) * by
    k_cache, v_cache = (cache.to(dtype) for cache in caches)
    inputs = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "qkv": packed(seq, count, heads, kv_heads, head_dim, dtype, spread),
        "chunk": place(start, count),
    }
    return ChunkCase(
        Ops.chunk_attention,
        inputs,
        {"out": (heads * head_dim,)},
        seq,
        dtype,
        # Over many keys most of the error is that of the weights, which without a cap are not the fused operation's.
        looser={} if softcap else FUSED if min(window or start + count, start + count) <= 32 else {"out": math.inf},
        gpu_slack=gpu_slack(softcap),
        options={"heads": heads, "window": window, "scale": scale or head_dim**-0.5, "softcap": softcap},
    )


def store_case(
    heads: int, kv_heads: int, head_dim: int, slots: int, start: int, count: int, seq: int, dtype: torch.dtype
) -> ChunkCase:
    inputs = {
        "k_cache": random(BATCH, kv_heads, slots, head_dim, dtype=dtype),
        "v_cache": random(BATCH, kv_heads, slots, head_dim, dtype=dtype),
        "qkv": packed(seq, count, heads, kv_heads, head_dim, dtype, 1.0),
        "chunk": place(start, count),
    }
    written = ("k_cache", "v_cache")
    return ChunkCase(Ops.store_chunk, inputs, {}, seq, dtype, written, written, options={"heads": heads})


CAPPED = {"softcap": 50.0, "scale": 20**-0.5, "spread": 2.0}
# heads, kv_heads, head_dim, window, start, count, seq and options of chunk_attention. A block has 32 or 16 keys, and 16
# queries of one key head.
ATTENTION: dict[str, tuple[Any, ...]] = {
    "mqa of 8, head_dim 256": (8, 1, 256, None, 0, 13, 16, {}),
    "mha, head_dim 80": (2, 2, 80, None, 5, 19, 20, {}),
    "group of 3, few dims": (3, 1, 6, None, 33, 9, 9, {}),
    "window shorter than the chunk, round the ring": (4, 2, 64, 11, 37, 21, 24, {}),
    "window in a longer cache": (4, 2, 64, 11, 37, 21, 24, {"spare_slots": 9}),
    "window longer than the chunk, round the ring": (4, 1, 48, 40, 103, 12, 16, {}),
    "window at the start": (4, 2, 32, 40, 0, 45, 48, {}),
    "one token after many": (4, 1, 64, None, 80, 1, 16, {}),
    "softcap, first chunk": (4, 2, 64, None, 0, 40, 40, CAPPED),
    "softcap, window": (4, 2, 64, 24, 50, 38, 40, CAPPED),
}


def _chunk_attention(sizes: tuple[Any, ...], dtype: torch.dtype) -> Case:
    *numbers, options = sizes
    heads, kv_heads, head_dim, window, start, count, seq = numbers
    return chunk_attention_case(heads, kv_heads, head_dim, window, start, count, seq, dtype, **options)


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "residual_norm": lambda dtype: residual_norm_case(5, 84, dtype, False, False),
    "residual_norm, branch": lambda dtype: residual_norm_case(5, 84, dtype, True, False),
    "residual_norm, normed branch": lambda dtype: residual_norm_case(5, 84, dtype, True, True),
    "gated_product": lambda dtype: gated_case(3, 1100, dtype),
    "dequantize 5x1100, int8": lambda dtype: dequantize_case(5, 1100, "int8", dtype),
    "dequantize 5x384, int4": lambda dtype: dequantize_case(5, 384, "int4", dtype),
    "rotate_heads": lambda dtype: rotate_case(4, 2, 64, 7, 9, 12, dtype, False),
    "rotate_heads, norms, head_dim 80": lambda dtype: rotate_case(3, 1, 80, 0, 11, 11, dtype, True),
    **{f"chunk_attention {name}": partial(_chunk_attention, sizes) for name, sizes in ATTENTION.items()},
    "store_chunk": lambda dtype: store_case(4, 2, 64, 100, 37, 13, 16, dtype),
    "store_chunk round the ring": lambda dtype: store_case(3, 1, 6, 20, 37, 13, 16, dtype),
    "store_chunk longer than the ring": lambda dtype: store_case(4, 2, 80, 11, 37, 21, 24, dtype),
}

"""The inputs of decode_attention, alone and followed by the output projection."""

from __future__ import annotations

import itertools
import math

import torch

from runtime.check.case import EPS, UNFILLED, Case, Results, random
from runtime.kernels import attention_splits
from runtime.kernels.attention_splits import AttentionSplits

# Without a cap Hugging Face's attention is a fused operation of PyTorch's, which rounds the weights to 16 bits in its
# own blocks of keys; a kernel rounds them in others. Two such errors that know nothing of each other are sqrt(2) of one
# apart.
FUSED = {"out": math.sqrt(2)}
# Of queries and keys. What a rounding of large scores, or before them, does to the weights is more than their own.
LARGE_SCORES = 2.0
# The roundings of what is made of such an output show nothing; the catalogue has a case whose attention has none of its
# own.
FUSED_PAIR = {"attended": FUSED["out"], "out": math.inf}


def gpu_slack(softcap: float | None) -> float:
    """A GPU's exp is good to 2^-22, and so is a weight. A cap multiplies what tanh makes of that, and a score's error
    is its weight's."""
    return (softcap or 1.0) * 2**-22


class AttentionCase(Case):
    """A step of attention, whose caches are compared apart: the new keys, and everything else."""

    def run(self, function, rows=slice(None), dtype=None, device=None, **changed) -> Results:
        results = super().run(function, rows, dtype, device, **changed)
        keys = results.pop("k_cache")
        positions = self.inputs["position"][rows].to(keys.device)
        at = torch.arange(len(keys), device=keys.device), slice(None), positions % keys.shape[2]
        results["new_keys"] = keys[at].clone()
        keys[at] = 0
        return results | {"other_keys": keys}


def attention_case(
    positions: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
    *,
    qk_norm: bool = False,
    softcap: float | None = None,
    scale: float | None = None,
    spread: float = 1.0,
    spare_slots: int = 0,
) -> AttentionCase:
    """A cache with a past, and one new token per row.

    Args:
        spread: of queries and keys. A cap shows where scores come near it; 0 makes all weights equal.
        spare_slots: of a cache that is longer than the window.
    """
    rows, limit = len(positions), max(positions) + 1
    seen = limit if window is None else min(window, limit)
    slots = seen + spare_slots
    k, v = (torch.full((rows, kv_heads, slots, head_dim), UNFILLED, dtype=dtype) for _ in "kv")
    for (row, position), (cache, by) in itertools.product(enumerate(positions), ((k, spread), (v, 1.0))):
        for past in range(max(0, position - seen + 1), position):
            cache[row, :, past % slots] = (torch.randn(kv_heads, head_dim) * by).to(dtype)
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim)
    qkv[:, : heads + kv_heads] *= spread
    angles = torch.rand(limit, head_dim // 2) * 6
    inputs = {
        "k_cache": k,
        "v_cache": v,
        "qkv": qkv.flatten(1).to(dtype),
        "position": torch.tensor(positions, dtype=torch.int32),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
    }
    if qk_norm:
        inputs |= {name: random(head_dim, dtype=dtype, scale=0.1) for name in ("q_norm", "k_norm")}
    options = {"heads": heads, "scale": scale or head_dim**-0.5, "eps": EPS, "window": window, "softcap": softcap}

    def call(ops, out, k_cache, v_cache, qkv, position, cos, sin, **options):
        splits = empty_splits(out, heads, head_dim)
        ops.decode_attention(out, k_cache, v_cache, qkv, position, cos, sin, splits=splits, **options)

    # Three roundings to 16 bits hide what a fused multiply-add does to fp32; a norm's sum may move a rounding.
    elementwise = dtype.itemsize == 2 and not qk_norm
    return AttentionCase(
        call,
        inputs,
        {"out": (heads * head_dim,)},
        rows,
        dtype,
        written=("k_cache", "v_cache"),
        exact=("other_keys", "v_cache", *(("new_keys",) if elementwise else ())),
        looser={} if softcap or spread >= LARGE_SCORES else FUSED,
        gpu_slack=gpu_slack(softcap),
        options=options,
    )


def pair_case(attention: AttentionCase, outputs: int, looser: dict[str, float] = FUSED_PAIR) -> AttentionCase:
    """A step of attention and the projection of its output."""
    heads = attention.options["heads"]
    width = attention.outputs["out"][0]
    dtype = attention.dtype
    inputs = attention.inputs | {
        "weight": random(outputs, width, dtype=dtype, scale=width**-0.5),
        "residual": random(attention.rows, outputs, dtype=dtype),
    }

    def call(ops, out, attended, k_cache, v_cache, qkv, position, cos, sin, weight, residual, **options):
        splits = empty_splits(attended, heads, width // heads)
        ops.decode_attention(attended, k_cache, v_cache, qkv, position, cos, sin, splits=splits, **options)
        ops.residual_linear(out, attended, weight, residual=residual)

    return AttentionCase(
        call,
        inputs,
        {"attended": (width,), "out": (outputs,)},
        attention.rows,
        dtype,
        written=attention.written,
        exact=attention.exact,
        looser=looser,
        gpu_slack=attention.gpu_slack,
        options=attention.options,
    )


def empty_splits(out: torch.Tensor, heads: int, head_dim: int, most: int | None = None) -> AttentionSplits:
    """Splits for an output, NaN where no kernel has written: `most` of older keys, or as many as any row can have."""
    if most is None:
        most = max(attention_splits.WARP_SPLITS.most, attention_splits.GROUP_SPLITS.most)
    splits = AttentionSplits.allocate(len(out), most, heads, head_dim, out.device)
    return AttentionSplits(*(tensor.fill_(float("nan")) for tensor in splits))

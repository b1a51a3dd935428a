"""Rows that are successive positions of one sequence on a CPU's compiled kernels, in one call and as so many decode
steps. Their keys are in the cache once the call is done."""

from __future__ import annotations

from typing import Any

import torch

from runtime.check.backends import CompiledOps
from runtime.check.case import EPS
from runtime.check.comparison import require
from runtime.kernels.ops import Ops

ROW, SEQUENCES = 1, 3
# heads, kv_heads, head_dim, window, slots, first position, rows and softcap
SEQUENCES_OF = {
    "round the ring": (4, 2, 64, 40, 40, 100, 13, 50.0),
    "window in a longer cache": (4, 1, 80, 40, 49, 37, 5, None),
    "longer than the window": (4, 1, 80, 7, 7, 3, 64, None),
    "no window": (8, 8, 32, None, 200, 150, 50, None),
    "one row": (4, 1, 64, None, 200, 0, 1, None),
}


def assert_bits_of_steps(name: str, dtype: torch.dtype) -> None:
    """Asserts that rows in one call, on one thread and on three, leave the bits of as many decode steps."""
    heads, kv_heads, head_dim, window, slots, start, rows, softcap = SEQUENCES_OF[name]
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    cache, qkv = random(2, SEQUENCES, kv_heads, slots, head_dim), random(rows, (heads + 2 * kv_heads) * head_dim)
    angles = torch.rand(200, head_dim // 2, generator=generator) * 6
    position = torch.arange(start, start + rows, dtype=torch.int32)
    arguments = qkv, position, angles.cos().to(dtype), angles.sin().to(dtype)
    options: dict[str, Any] = {
        "heads": heads,
        "scale": head_dim**-0.5,
        "eps": EPS,
        "window": window,
        "softcap": softcap,
    }
    if softcap is None:
        options |= {"q_norm": random(head_dim), "k_norm": random(head_dim)}
    results = []
    for threads, call in ((1, by_steps), (1, Ops.sequence_attention), (3, Ops.sequence_attention)):
        out, (k_cache, v_cache) = torch.full((rows, heads * head_dim), torch.nan, dtype=dtype), cache.clone()
        call(CompiledOps(threads), out, k_cache, v_cache, *arguments, row=torch.tensor([ROW]), **options)
        results.append({"out": out, "k_cache": k_cache, "v_cache": v_cache})
    for threads, result in zip((1, 3), results[1:], strict=True):
        for what, value in result.items():
            equal = torch.equal(value, results[0][what])
            require(equal, f"{what}: rows in one call on {threads} threads have other bits than as many decode steps")


def by_steps(ops, out, k_cache, v_cache, qkv, position, *tables, row, **options):
    """sequence_attention as so many decode_attention."""
    own = slice(int(row), int(row) + 1)
    for at in range(len(qkv)):
        step = slice(at, at + 1)
        ops.decode_attention(out[step], k_cache[own], v_cache[own], qkv[step], position[step], *tables, **options)

"""Rows that are successive positions of one sequence, in one call and as so many decode steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from runtime.check.attention_cases import empty_splits
from runtime.check.case import DEVICE, EPS, random
from runtime.check.comparison import assert_as_exact, require
from runtime.kernels.ops import Ops, TorchOps, ops_for
from runtime.kernels.store_keys import Buffer

ROW, SEQUENCES = 1, 3


class Sequence(NamedTuple):
    """What a step of rows of one sequence is given."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    qkv: torch.Tensor
    position: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]
    options: dict[str, Any]

    def __repr__(self) -> str:
        return f"Sequence({self.rows} rows, {self.qkv.device})"

    @property
    def rows(self) -> int:
        return len(self.qkv)

    def out(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output that nothing was written to."""
        width = self.options["heads"] * self.k_cache.shape[3]
        return torch.full((self.rows, width), torch.nan, dtype=dtype or self.qkv.dtype, device=self.qkv.device)

    def new(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """New keys or values that nothing was written to."""
        _, kv_heads, _, head_dim = self.k_cache.shape
        return torch.full(
            (self.rows, kv_heads, head_dim), torch.nan, dtype=dtype or self.qkv.dtype, device=self.qkv.device
        )


# heads, kv_heads, head_dim, window, slots, first position, rows and options; a block has 32 keys, or 16 in fp32.
SEQUENCES_OF: dict[str, tuple[Any, ...]] = {
    "no older key": (2, 2, 32, None, 64, 0, 3, {}),
    "over blocks' ends": (4, 1, 32, None, 100, 28, 8, {"qk_norm": True}),
    "over splits' growth": (2, 1, 32, None, 200, 125, 7, {}),
    "round the ring": (4, 2, 48, 40, 40, 77, 5, {"softcap": 50.0, "scale": 20**-0.5}),
    "window in a longer cache, 8 heads for a key": (8, 1, 32, 40, 49, 95, 5, {"qk_norm": True}),
    "a ring of as many slots as rows": (2, 1, 32, 8, 8, 21, 8, {}),
    "before the window is full": (4, 2, 32, 40, 40, 33, 4, {"softcap": 30.0}),
    "one row": (2, 1, 80, None, 64, 40, 1, {"qk_norm": True}),
}


def sequence(name: str, dtype: torch.dtype, device: str = DEVICE) -> Sequence:
    heads, kv_heads, head_dim, window, slots, first, rows, options = SEQUENCES_OF[name]
    qkv = random(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = torch.rand(first + rows, head_dim // 2) * 6
    given = {"heads": heads, "scale": head_dim**-0.5, "eps": EPS, "window": window, "softcap": None} | options
    if given.pop("qk_norm", False):
        given |= {norm: random(head_dim, dtype=dtype, scale=0.1) for norm in ("q_norm", "k_norm")}
    return Sequence(
        random(SEQUENCES, kv_heads, slots, head_dim, dtype=dtype).to(device),
        random(SEQUENCES, kv_heads, slots, head_dim, dtype=dtype).to(device),
        qkv.to(device),
        torch.arange(first, first + rows, dtype=torch.int32, device=device),
        (angles.cos().to(device, dtype), angles.sin().to(device, dtype)),
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()},
    )


def kernels(device: str | torch.device = DEVICE) -> Ops:
    """Those of a model of several rows."""
    return ops_for(torch.device(device), 8)


def together(given: Sequence, rows: int | None = None, ops: Ops | None = None, dtype: torch.dtype | None = None):
    """The output, new keys and new values of the first rows in one call, in fp64 if that is asked for."""
    part = given._replace(qkv=given.qkv[:rows], position=given.position[:rows])
    out, keys, values = part.out(dtype), part.new(dtype), part.new(dtype)

    def cast(value):
        return value.to(dtype) if dtype and isinstance(value, torch.Tensor) and value.is_floating_point() else value

    caches: Any = [cast(cache).clone() for cache in (part.k_cache, part.v_cache)]
    (ops or kernels(given.qkv.device)).sequence_attention(
        out,
        *(*caches, cast(part.qkv), part.position, *map(cast, part.tables)),
        row=torch.tensor([ROW], device=given.qkv.device),
        new_keys=keys,
        new_values=values,
        splits=empty_splits(out, part.options["heads"], part.k_cache.shape[3]),
        **{name: cast(value) for name, value in part.options.items()},
    )
    for cache, before in zip(caches, (part.k_cache, part.v_cache), strict=True):
        require(torch.equal(cache, cast(before)), "sequence_attention has written to the cache")
    return out, keys, values


def steps(given: Sequence) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The output of as many decode steps, each of one row, and the caches before and after each."""
    out, caches = given.out(), [(given.k_cache, given.v_cache)]
    for at in range(given.rows):
        if given.qkv.is_cuda:
            torch.cuda.synchronize()  # decode_attention reads its cache before it waits for the kernel before it
        row, own = slice(at, at + 1), slice(ROW, ROW + 1)
        k_cache, v_cache = (cache.clone() for cache in caches[-1])
        splits = empty_splits(out[row], given.options["heads"], k_cache.shape[3])
        kernels(given.qkv.device).decode_attention(
            out[row],
            k_cache[own],
            v_cache[own],
            given.qkv[row],
            given.position[row],
            *given.tables,
            splits=splits,
            **given.options,
        )
        caches.append((k_cache, v_cache))
    return out, caches


def stored(given: Sequence, keys: torch.Tensor, values: torch.Tensor, count: int, ops: Ops):
    """The caches once the first `count` of the new keys and values are in them."""
    caches = torch.cat([cache.flatten() for cache in (given.k_cache, given.v_cache)])
    new = torch.cat([keys.flatten(), values.flatten()])
    shape = given.k_cache.shape
    buffers = [Buffer(0, 0, *shape[1:]), Buffer(given.k_cache.numel(), keys.numel(), *shape[1:])]
    device = given.qkv.device
    row, number = (torch.tensor([value], device=device) for value in (ROW, count))
    width = shape[1] * shape[3]
    ops.store_keys(caches, new, torch.tensor(buffers, device=device), given.position, row, number, width)
    return tuple(cache.view(shape) for cache in caches.chunk(2))


def assert_bits_of_steps(given: Sequence) -> None:
    """Asserts that rows in one call have the bits of as many decode steps, and that storing some of their keys leaves
    the caches that so many steps leave."""
    expected, caches = steps(given)
    out, keys, values = together(given)
    require(torch.equal(out, expected), "rows in one call have other bits than as many decode steps")
    for count in {0, 1, given.rows // 2, given.rows}:
        for ops in (kernels(given.qkv.device), TorchOps()):
            for cache, after in zip(stored(given, keys, values, count, ops), caches[count], strict=True):
                require(torch.equal(cache, after), f"{count} keys stored leave another cache than {count} decode steps")


def assert_right(given: Sequence) -> float:
    """Asserts that rows in one call are the reference's, against fp64 truth. Returns the error's share of its bound."""
    out, keys, values = together(given)
    plain, truth = together(given, ops=TorchOps()), together(given, ops=TorchOps(), dtype=torch.float64)
    require(torch.equal(values, plain[2]), "new values differ from the reference's")
    return max(
        assert_as_exact(out, plain[0], truth[0], name="out"), assert_as_exact(keys, plain[1], truth[1], name="new_keys")
    )

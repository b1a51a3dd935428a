"""Filters: which tokens one is drawn from, as transformers' top-k, top-p and min-p choose them, in that order.

    z     = logits / temperature, fp32
    top-k   z >= the k-th greatest z                            those as great as the last are in
    top-p   sum of exp(z) over what ranks higher < p * sum over all that top-k left
    min-p   z >= max z + log(min_p)

Rank is by z, and among equals by id, the lower id first; transformers leaves the order of equals to its sort. Sums for
top-p are of integers, exp(z - max z) in units of 2^-40, so that they are exact in any order: what is kept depends
neither on threads nor on a device's sums. Sorting a whole vocabulary takes longer than a decode step of a small model,
so only the likeliest are sorted, as many as it takes.
"""

from __future__ import annotations

import math

import torch

MASS_BITS = 40  # a vocabulary of 2^23 tokens would pass 63 bits
SORTED = (256, 4096, 65536)  # how many of the likeliest are tried first


def kept(z: torch.Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> torch.Tensor:
    """The tokens that one is drawn from.

    Args:
        z: [vocab] fp32, scaled logits; -inf in a token that is banned. At least one is finite, and none is a NaN.
        top_k, top_p, min_p: as `SamplingParams`; None for no such filter.

    Returns:
        Their ids, ascending, int64: at least one.
    """
    ids, greatest = None, z.max()
    if top_k and top_k < len(z):
        ids = _at_least(z, z.topk(top_k).values[-1])
        z = z[ids]
    if top_p is not None and top_p < 1:
        within = _top_p(z, greatest, top_p)
        ids, z = within if ids is None else ids[within], z[within]
    if min_p:
        within = _at_least(z, greatest + math.log(min_p))
        ids = within if ids is None else ids[within]
    return _at_least(z, -torch.inf) if ids is None else ids


def _at_least(z: torch.Tensor, least: torch.Tensor | float) -> torch.Tensor:
    """Where z is finite and not less."""
    return (z >= max(float(least), torch.finfo(z.dtype).min)).nonzero()[:, 0]


def _masses(z: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    return (z - greatest).exp_().mul_(2.0**MASS_BITS).to(torch.int64)


def _top_p(z: torch.Tensor, greatest: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which of z [n] top-p keeps, ascending."""
    least_mass = top_p * float(_masses(z, greatest).sum())
    within = None
    for count in SORTED:
        if count >= len(z):
            break
        likeliest = _at_least(z, z.topk(count).values[-1])
        if int(_masses(z[likeliest], greatest).sum()) >= least_mass:  # all others rank lower, and so are out
            within = likeliest
            break
    if within is None:
        within = _at_least(z, -torch.inf)
    order = within[z[within].sort(descending=True, stable=True).indices]
    masses = _masses(z[order], greatest)
    return order[masses.cumsum(0) - masses < least_mass].sort().values

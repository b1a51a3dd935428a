"""Filters: which tokens may be drawn, as transformers' top-k, top-p and min-p choose them, in that order.

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

import numpy as np
import torch

MASS_BITS = 40  # a vocabulary of 2^23 tokens would pass 63 bits
DEPTHS = (6, 8, 10, 12, 14)  # how far below the greatest z the tokens are that top-p tries first
CHUNK = 256  # of a vocabulary, for its greatest values


def kept(z: torch.Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> torch.Tensor:
    """The tokens that may be drawn.

    Args:
        z: [vocab] fp32, scaled logits; -inf for a banned token. At least one is finite, and none is a NaN.
        top_k, top_p, min_p: as `SamplingParams`; None for no such filter.

    Returns:
        Their ids, ascending, int64: at least one.
    """
    ids, greatest = None, z.max()
    if top_k and top_k < len(z):
        ids = at_least(z, nth_greatest(z, top_k))
        z = z[ids]
    if top_p is not None and top_p < 1:
        within = _top_p(z, greatest, top_p)
        ids, z = within if ids is None else ids[within], z[within]
    if min_p:
        within = at_least(z, greatest + math.log(min_p))
        ids = within if ids is None else ids[within]
    return at_least(z, -torch.inf) if ids is None else ids


def at_least(z: torch.Tensor, least: torch.Tensor | float) -> torch.Tensor:
    """Where z [n] fp32 is finite and not less: ids, ascending, int64."""
    least = max(float(least), torch.finfo(z.dtype).min)
    if z.device.type == "cpu":  # torch's own takes seven times as long there
        return torch.from_numpy(np.flatnonzero(z.numpy() >= least))
    return (z >= least).nonzero()[:, 0]


def nth_greatest(z: torch.Tensor, n: int) -> torch.Tensor:
    """The n-th greatest of z [vocab] fp32, n from 1 to vocab; -inf where fewer are finite."""
    chunks = z[: len(z) // CHUNK * CHUNK].view(-1, CHUNK)
    if n <= len(chunks):
        # n chunks have a value at least as great as the n-th greatest of the chunks' maxima, so lesser values can be
        # dropped.
        z = z[at_least(z, chunks.amax(dim=1).topk(n).values[-1])]
    return z.topk(n).values[-1] if n <= len(z) else z.new_tensor(-torch.inf)


def _masses(z: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    return (z - greatest).exp_().mul_(2.0**MASS_BITS).to(torch.int64)


def _top_p(z: torch.Tensor, greatest: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which of z [n] top-p keeps, ascending."""
    masses = _masses(z, greatest)
    # An integer, since comparing integers with a float would round them to its 24 bits.
    least_mass = max(1, math.ceil(top_p * int(masses.sum())))
    for depth in (*DEPTHS, torch.inf):
        within = at_least(z, greatest - depth)
        if int(masses[within].sum()) >= least_mass:  # all others rank lower, and so are out
            break
    order = within[z[within].sort(descending=True, stable=True).indices]
    masses = masses[order]
    return order[masses.cumsum(0) - masses < least_mass].sort().values

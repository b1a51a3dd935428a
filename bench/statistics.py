"""Statistics that are robust on a noisy machine: medians, percentiles, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDE_SPREAD = 0.1  # interquartile range over median above which a row gets a warning


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of some samples, interpolated as numpy's "linear" does.

    Raises:
        ValueError: there are none.
    """
    if not len(values):
        raise ValueError("percentile: expected at least one sample, got none")
    return float(np.percentile(values, percent))


def median_ratio_interval(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The ratio median(b) / median(a) and its bootstrap interval: both sides are resampled with replacement.

    Returns:
        (ratio, lower end, upper end). Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    if not len(a) or not len(b):
        raise ValueError(f"median_ratio_interval: expected samples on both sides, got {len(a)} and {len(b)}")
    generator = np.random.default_rng(seed)
    drawn = [np.median(generator.choice(np.asarray(side, float), (resamples, len(side))), axis=1) for side in (a, b)]
    ratios = drawn[1] / drawn[0]
    tail = 100 * (1 - confidence) / 2
    return (
        float(np.median(b) / np.median(a)),
        float(np.percentile(ratios, tail)),
        float(np.percentile(ratios, 100 - tail)),
    )

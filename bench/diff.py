"""`bench diff A B`: what changed between two reports, with confidence intervals from their samples.

Exit codes: 0 nothing in B is slower beyond noise; 1 something is slower, its whole 95 % interval above the bound (1, or
1.05 with --fail-above 5%), or failed; 2 nothing could be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from runtime.bench.records import Report, Samples
from runtime.bench.table import aligned

SLOWER, INCOMPARABLE = 1, 2
LEAST_SAMPLES = 5  # with fewer, an interval of medians is hardly narrower than the range of the samples
TOO_FEW = "too few samples"
SLOWER_B = "B slower"
HEADING = ["configuration", "time", "A", "B", "B / A", "95 % interval", ""]


@dataclass(frozen=True)
class Change:
    """One time of one configuration in both reports; a ratio below 1 means that B is faster."""

    configuration: str
    quantity: str
    a: float  # the medians
    b: float
    ratio: float
    low: float  # its 95 % interval
    high: float
    verdict: str

    def cells(self) -> list[str]:
        """The row of cells under HEADING."""
        numbers = [f"{self.a:,.3f}", f"{self.b:,.3f}", f"{self.ratio:.3f}", f"{self.low:.3f} to {self.high:.3f}"]
        return [self.configuration, self.quantity, *numbers, self.verdict]


@dataclass(frozen=True)
class Difference:
    """Two reports, compared."""

    environments: list[str]  # what differs besides the code
    only_in: list[str]  # what is in one report alone
    lost: list[str]  # configurations that A has times for and that failed in B, with the reason
    changes: list[Change]

    def exit_code(self, allowed: float = 0.0) -> int:
        """The command's exit code, where B may be slower by the share `allowed`."""
        if self.lost or any(change.verdict == SLOWER_B and change.low > 1 + allowed for change in self.changes):
            return SLOWER
        return INCOMPARABLE if all(change.verdict.startswith(TOO_FEW) for change in self.changes) else 0

    def to_json(self, code: int) -> str:
        """One JSON document."""
        return json.dumps({"exit_code": code, **asdict(self)}, indent=1) + "\n"

    def text(self, *, markdown: bool = False) -> str:
        """Remarks, as a list if Markdown is wanted, then the changes as a table."""
        remarks = [*self.environments, *self.only_in, *(f"no time in B: {name}" for name in self.lost)]
        if markdown:
            remarks = [f"- {line}" for line in remarks]
        return "\n".join([*remarks, "", *aligned(HEADING, [change.cells() for change in self.changes]), ""])


def difference(a: Report, b: Report) -> Difference:
    """Compares every time for which both reports have samples.

    Raises:
        ValueError: the reports have nothing in common.
    """
    before, after = times(a), times(b)
    timed = {configuration for configuration, _ in before}
    lost = [f"{row.name} ({row.status})" for row in b.all_rows if row.status != "ok" and row.name in timed]
    found = [_change(*key, before[key], after[key]) for key in before if key in after]
    if not found and not lost:
        raise ValueError("expected two reports of the same configurations, got none in common")
    alone = [
        f"only in {name}: {configuration}"
        for name, keys in (("A", before.keys() - after.keys()), ("B", after.keys() - before.keys()))
        for configuration in sorted({key[0] for key in keys})
    ]
    return Difference(list(_environments(a, b)), alone, lost, found)


def times(report: Report) -> dict[tuple[str, str], Samples]:
    """The samples to compare, by configuration and quantity."""
    return {
        (row.name, quantity): samples
        for row in report.all_rows
        for quantity, samples in row.times().items()
        if samples is not None
    }


def _change(configuration: str, quantity: str, before: Samples, after: Samples) -> Change:
    ratio, low, high = median_ratio_interval(before.values, after.values)
    verdict = "no difference" if low <= 1 <= high else "B faster" if high < 1 else SLOWER_B
    if min(len(before.values), len(after.values)) < LEAST_SAMPLES:
        verdict = f"{TOO_FEW}: {len(before.values)} and {len(after.values)}, expected {LEAST_SAMPLES} or more"
    return Change(configuration, quantity, before.p50, after.p50, ratio, low, high, verdict)


def median_ratio_interval(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The ratio median(b) / median(a), and the ends of its 95 % bootstrap interval: both sides are resampled with
    replacement. Source: Efron, "Bootstrap methods: another look at the jackknife", 1979."""
    generator = np.random.default_rng(seed)
    drawn = [np.median(generator.choice(np.asarray(side, float), (resamples, len(side))), axis=1) for side in (a, b)]
    low, high = np.percentile(drawn[1] / drawn[0], (2.5, 97.5))
    return float(np.median(b) / np.median(a)), float(low), float(high)


def _environments(a: Report, b: Report) -> Iterator[str]:
    """The differences between the two environments, except clocks, which always differ a little."""
    ours, theirs = a.environment.flat(), b.environment.flat()
    for name in ours | theirs:
        before, after = ours.get(name), theirs.get(name)
        if before != after and name != "clocks_mhz":
            yield f"{name}: A {before}, B {after}"

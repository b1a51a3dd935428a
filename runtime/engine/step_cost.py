"""The time that a step of several rows takes, in steps of one row, measured on the steps that are taken anyway."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

# What each further row is assumed to add before it has been timed, and how many timings are kept per number of rows.
ROW_COST = 0.15
KEPT = 7


class StepCost:
    """The costs of steps, by their number of rows. They decide how many rows a step has, never its results."""

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=KEPT)  # seconds
        self._of: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))  # in plain steps

    @property
    def is_known(self) -> bool:
        """Whether a step of one row has been timed."""
        return bool(self._plain)

    def timed(self, rows: int, seconds: float) -> None:
        """Notes how long a step has taken."""
        if rows == 1:
            self._plain.append(seconds)
        elif self._plain:  # rows never take longer together than apart, unless something else has held them up
            self._of[rows].append(min(max(1.0, seconds / statistics.median(self._plain)), float(rows)))

    def of(self, rows: int) -> float:
        """The median cost of a step of so many rows; the assumption counts as one timing, so that a single slow step
        decides nothing."""
        guess = 1 + ROW_COST * (rows - 1)
        return statistics.median([guess, *self._of[rows]]) if rows > 1 else 1.0

"""Charts as data: where things lie along their axes, in percent of the width. charts.html draws them.

Widths are percentages and heights pixels, so a chart fills any page without scaling its text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TICKS = 5  # of a linear axis, at most, beside 0
LOG_TICKS = 8


@dataclass(frozen=True)
class Axis:
    """An axis: its label with the unit, its ends, and (value, text) of its ticks."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    @classmethod
    def linear(cls, label: str, values: Iterable[float], low: float = 0.0, ticks: int = TICKS) -> Axis:
        """A linear axis between two round numbers that enclose `low` and the largest value."""
        most = max((value for value in values if math.isfinite(value)), default=0.0)
        span = most - low if most > low else 1.0
        decade = 10 ** math.floor(math.log10(span / ticks))
        step = next(decade * by for by in (1, 2, 2.5, 5, 10) if decade * by * ticks >= span * (1 - 1e-9))
        first, last = math.floor(low / step), math.ceil((low + span) / step - 1e-9)
        marks = tuple((number * step, f"{number * step:,.10g}") for number in range(first, last + 1))
        return cls(label, marks[0][0], marks[-1][0], marks)

    @classmethod
    def powers(cls, label: str, base: int, values: Iterable[float]) -> Axis:
        """A logarithmic axis between two powers of `base` that enclose the values, which are positive."""
        logs = [math.log(value, base) for value in values]
        low, high = math.floor(min(logs) + 1e-9), math.ceil(max(logs) - 1e-9)
        high = max(high, low + 1)
        every = math.ceil((high - low + 1) / LOG_TICKS)
        ticks = tuple((float(base) ** power, _power(base, power)) for power in range(low, high + 1, every))
        return cls(label, float(base) ** low, float(base) ** high, ticks, is_log=True)

    def at(self, value: float) -> float:
        """Where a value lies, in percent of the axis; one beyond it lies at its end."""
        if not math.isfinite(value):
            return 100.0 if value > 0 else 0.0
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return round(min(max(100 * (value - low) / (high - low), 0.0), 100.0), 3)


@dataclass(frozen=True)
class Bar:
    """One bar: its value, the middle half of the samples behind it, and the cells of text beside it."""

    label: str
    value: float
    cells: tuple[str, ...]
    quarters: tuple[float, float] | None = None
    colour: int = 0


@dataclass(frozen=True)
class BarGroup:
    """Bars under one heading, with their common limit."""

    label: str
    bars: tuple[Bar, ...]
    limit: float | None = None


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, as a table: what a row stands for, the axis, and the headings of the cells."""

    row: str
    label: str  # of the axis, with the unit
    columns: tuple[str, ...]
    groups: tuple[BarGroup, ...]
    axis: Axis = field(init=False)

    def __post_init__(self) -> None:
        bars = [bar for group in self.groups for bar in group.bars]
        ends = [max(bar.value, *(bar.quarters or ())) if bar.quarters else bar.value for bar in bars]
        limits = [group.limit for group in self.groups if group.limit is not None]
        object.__setattr__(self, "axis", Axis.linear(self.label, [*ends, *limits]))


@dataclass(frozen=True)
class Point:
    """A point of a line, with the middle half of the samples behind it."""

    x: float
    y: float
    quarters: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """Points in order; a dashed one is a limit, and has no marks."""

    label: str
    points: tuple[Point, ...]
    colour: int = 0
    is_dashed: bool = False


@dataclass(frozen=True)
class Lines:
    """Lines over two axes."""

    x: Axis
    y: Axis
    lines: tuple[Line, ...]

    @property
    def text(self) -> str:
        """The chart in words, for those who cannot see it."""
        told = (
            f"{line.label}: " + ", ".join(f"{point.y:,.4g} at {point.x:,.4g}" for point in line.points)
            for line in self.lines
        )
        return f"Lines of {self.y.label} over {self.x.label}. " + "; ".join(told)


@dataclass(frozen=True)
class Bin:
    """One bin of a histogram: its ends, its count, how many of them are marked, and a line of text on it."""

    low: float
    high: float
    count: float
    text: str
    marked: float = 0.0


@dataclass(frozen=True)
class Histogram:
    """Counts over an axis, with a line at one value."""

    text: str  # the chart in words, for those who cannot see it
    x: Axis
    y: Axis
    bins: tuple[Bin, ...]
    line: float | None = None
    colour: int = 0  # of the bins; the next one is that of their marked part
    height: int = 200  # pixels


def bins(values: Sequence[float], low: float, high: float, count: int) -> list[int]:
    """How many values are in each of `count` equal bins from `low` to `high`; those beyond count in the first or
    last."""
    found = [0] * count
    for value in values:
        found[min(max(int((value - low) / (high - low) * count), 0), count - 1)] += 1
    return found


def _power(base: int, power: int) -> str:
    if base == 10:
        return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{base**power:,.10g}"

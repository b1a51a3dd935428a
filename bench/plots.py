"""The charts of a report: whatever it has numbers for, as data that runtime/page draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from runtime.bench.records import LEAST_GAPS, KernelRow, Report, Row, Samples
from runtime.page.charts import Axis, Bar, BarGroup, Bars, Bin, Histogram, Line, Lines, Point, bins

MOST_GROUPS = 8  # configurations that a chart of details shows
BINS = 60


def timed(report: Report) -> list[Row]:
    """The rows that have numbers."""
    return [row for row in report.rows if row.status == "ok" and row.decode_tokens_per_s is not None]


def sizes(row: Row) -> str:
    """A row's sizes in words."""
    batch = f", {row.batch_size} rows" if row.batch_size > 1 else ""
    return f"{row.gen_len:,} tokens after a prompt of {row.prompt_len:,}{batch}"


def parts(rows: Sequence[Row]) -> Bars | None:
    """Where a token's time goes: the operations of one decode step, the longest first."""
    groups = []
    for row in [row for row in rows if row.parts][:MOST_GROUPS]:
        whole = sum(part.time_us for part in row.parts)
        bars = []
        for part in sorted(row.parts, key=lambda part: -part.time_us):
            cells = (f"{part.time_us / 1e3:,.3f}", f"{part.time_us / whole:.1%}", f"{part.launches:,}")
            bars.append(Bar(part.name.replace("_", " "), part.time_us / 1e3, cells))
        step = "" if row.tpot_ms is None else f"; between two tokens pass {row.tpot_ms.p50:,.3g} ms"
        groups.append(BarGroup(f"{row.dtype}, {sizes(row)}: {whole / 1e3:,.3g} ms{step}", tuple(bars)))
    columns = ("ms", "share", "launches")
    return Bars("operation", "time in one decode step, ms", columns, tuple(groups)) if groups else None


def speed_over_context(rows: Sequence[Row]) -> Lines | None:
    """Decoding against context, with what the read bandwidth allows; None for rows of one context with peers."""
    peers = any(row.benchmark == "compare" for row in rows)
    if not rows or (peers and len({row.prompt_len for row in rows}) < 2):
        return None
    lines: dict[str, list[Point]] = {}
    limits: dict[str, dict[int, float]] = {}  # by context
    several = len({row.model for row in rows}) > 1
    for row in sorted(rows, key=_context):
        kind = row.dtype + (f", {row.batch_size} rows" if row.batch_size > 1 else "")
        kind = f"{row.model}, {kind}" if several else kind
        point = Point(_context(row), _rate(row).p50, _rate(row).quarters)
        lines.setdefault(f"{row.engine}, {kind}", []).append(point)
        limit = _limit(row)
        if limit is not None:
            limits.setdefault(f"the read bandwidth allows, {kind}", {})[_context(row)] = limit
    drawn = [Line(label, tuple(points), number) for number, (label, points) in enumerate(lines.items())]
    for number, (label, allowed) in enumerate(limits.items()):
        ends = [Point(context, limit) for context, limit in allowed.items()]
        if len(ends) == 1:  # one point makes no line, so it extends a little to both sides
            ends = [Point(ends[0].x * by, ends[0].y) for by in (0.7, 1.4)]
        drawn.append(Line(label, tuple(ends), number, is_dashed=True))
    points = [point for line in drawn for point in line.points]
    return Lines(
        Axis.powers("context in the middle of the answer, tokens (logarithmic)", 2, [point.x for point in points]),
        Axis.linear("decoding, tokens/s", [max(point.y, *(point.quarters or (0,))) for point in points]),
        tuple(drawn),
    )


def side_by_side(rows: Sequence[Row]) -> Bars | None:
    """Engines side by side, the fastest first."""
    peers = [row for row in rows if row.benchmark == "compare"]
    names = list(dict.fromkeys(row.engine for row in peers))
    if len(names) < 2:
        return None
    configurations: dict[tuple[str, str, str], list[Row]] = {}
    for row in peers:
        configurations.setdefault((row.model, row.dtype, sizes(row)), []).append(row)
    groups = []
    for (_, dtype, size), found in configurations.items():
        limit, fastest = _limit(found[0]), max(_rate(row).p50 for row in found)
        bars = []
        for row in sorted(found, key=lambda row: -_rate(row).p50):
            rate = _rate(row)
            equal = "" if row.equal_tokens is None else f"{row.equal_tokens:.0%}"
            cells = (f"{rate.p50:,.1f}", f"{rate.p50 / fastest:.2f}", equal)
            bars.append(Bar(row.engine, rate.p50, cells, rate.quarters, names.index(row.engine)))
        allowed = "" if limit is None else f"; the read bandwidth allows {limit:,.1f} tokens/s"
        groups.append(BarGroup(f"{dtype}, {size}{allowed}", tuple(bars), limit))
    columns = ("tokens/s", "of fastest", "tokens equal")
    return Bars("engine", "decoding, tokens/s", columns, tuple(groups))


def gaps(rows: Sequence[Row]) -> Iterator[tuple[str, str, Histogram]]:
    """The times between two tokens, (heading, note, histogram) of each row, on one axis. Of `LEAST_GAPS` or more gaps,
    the slowest percent is left out."""
    shown = [(row, row.inter_token_ms) for row in rows if row.inter_token_ms is not None][:MOST_GROUPS]
    if not shown:
        return
    kept = [
        [gap for gap in samples.values if len(samples.values) < LEAST_GAPS or gap <= samples.p99]
        for _, samples in shown
    ]
    engines = list(dict.fromkeys(row.engine for row in rows))
    x = Axis.linear("time between two tokens, ms", list(itertools.chain(*kept)), min(map(min, kept)))
    ends = [x.low + (x.high - x.low) / BINS * number for number in range(BINS + 1)]
    for (row, samples), values in zip(shown, kept, strict=True):
        every, counts = len(samples.values), bins(values, x.low, x.high, BINS)
        drawn = tuple(
            Bin(low, high, 100 * count / every, f"{low:,.2f} to {high:,.2f} ms: {count} of {every}")
            for low, high, count in zip(ends, ends[1:], counts, strict=False)
        )
        y = Axis.linear("share of gaps, %", [100 * count / every for count in counts], ticks=2)
        text = f"median {samples.p50:,.2f} ms, slowest {max(samples.values):,.2f} ms, {every:,} gaps"
        most = f"most from {min(values):,.2f} to {max(values):,.2f} ms"
        label = f"Histogram of times between two tokens, {row.engine}: {text}, {most}"
        histogram = Histogram(label, x, y, drawn, line=samples.p50, colour=engines.index(row.engine), height=90)
        yield f"{row.engine}, {row.dtype}, {sizes(row)}", text, histogram


def kernels(rows: Sequence[KernelRow]) -> Bars | None:
    """Each kernel's share of the read bandwidth, with PyTorch's for the same operation."""
    groups = []
    for row in rows:
        if row.time_us is None or row.share_of_read_bandwidth is None:
            continue
        share = 100 * row.share_of_read_bandwidth
        bars = [Bar("this runtime", share, (f"{share:.1f}", f"{row.time_us.p50:,.2f}"))]
        if row.torch_us is not None:
            theirs = share * row.time_us.p50 / row.torch_us.p50
            bars.append(Bar("PyTorch", theirs, (f"{theirs:.1f}", f"{row.torch_us.p50:,.2f}"), colour=7))
        groups.append(BarGroup(f"{row.kernel.replace('_', ' ')}, {row.dtype}, {row.shape}", tuple(bars), 100.0))
    return Bars("of", "share of the read bandwidth, %", ("%", "µs"), tuple(groups)) if groups else None


def _context(row: Row) -> int:
    return row.prompt_len + row.gen_len // 2


def _rate(row: Row) -> Samples:
    assert row.decode_tokens_per_s is not None, "a row has all of its numbers or none"
    return row.decode_tokens_per_s


def _limit(row: Row) -> float | None:
    """Tokens/s at which decoding would read its bytes at the full bandwidth; tokens of a batch share the weights."""
    if row.read_bandwidth_gb_s is None or not row.bytes_per_token:
        return None
    return row.read_bandwidth_gb_s * 1e9 / row.bytes_per_token

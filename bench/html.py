"""A report as one self-contained HTML page: the verdict, charts, tables, and what a reader needs to judge them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.bench import plots
from runtime.bench.records import LEAST_GAPS, Report
from runtime.bench.table import headline, in_flight_notes, notes, tables
from runtime.page.frame import render

TEMPLATE = Path(__file__).with_name("report.html")


def page(report: Report) -> str:
    """The page; it has no scripts, fonts or external requests."""
    rows, remarks, failed = plots.timed(report), notes(report), list(dict.fromkeys(_failed(report)))
    title, where = verdict(report), report.environment
    named = [", ".join(dict.fromkeys(getattr(row, name) for row in report.all_rows)) for name in ("model", "dtype")]
    time = report.time.replace("T", " ").replace("Z", " UTC")
    return render(
        TEMPLATE,
        title=f"gemma-runtime bench {report.command}: {title}",
        eyebrow=f"gemma-runtime bench {report.command}",
        verdict=title,
        is_good=not failed if failed or any(row.audit is not None for row in report.all_rows) else None,
        holds_for=[*named, time, f"{where.device_name} ({where.device}, {where.threads} threads)"],
        measured=_measured(report),
        failed=failed,
        parts=plots.parts(rows),
        context=plots.speed_over_context(rows),
        engines=plots.side_by_side(rows),
        gaps=list(plots.gaps(rows)),
        parts_left_out=max(0, sum(bool(row.parts) for row in rows) - plots.MOST_GROUPS),
        gaps_left_out=max(0, len(rows) - plots.MOST_GROUPS),
        least_gaps=LEAST_GAPS,
        kernels=plots.kernels(report.kernels),
        in_flight=[note for row in report.in_flight for note in in_flight_notes(row)],
        tables=[(name, *table) for name, table in tables(report).items()],
        conditions=_conditions(report),
        warnings=[note for note in remarks if note.startswith("warning")],
        notes=[note for note in remarks if not note.startswith("warning")],
        json=report.to_json(),
    )


def verdict(report: Report) -> str:
    """The report in one line: the headline of its first row, or what its other rows say."""
    lines = headline(report)
    if lines:
        return lines[0]
    refused = [row for row in report.all_rows if row.status == "refused"]
    if refused:
        return f"{len(refused)} of {len(report.all_rows)} configurations refused"
    shares = [row.share_of_read_bandwidth for row in report.kernels if row.share_of_read_bandwidth is not None]
    if shares:
        kernels = f"{len(shares)} kernel{'' if len(shares) == 1 else 's'}"
        return f"{_range(shares)} of the read bandwidth, {kernels}, parity passed"
    ratios = [row.decode_ratio.p50 for row in report.in_flight if row.decode_ratio is not None]
    if ratios:
        return f"Requests that come and go decode at {_range(ratios)} of a static batch's speed, parity passed"
    return "No configuration has numbers"


def _range(shares: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{end(shares):.0%}" for end in (min, max)))


def _failed(report: Report) -> list[str]:
    """This runtime's configurations without numbers, and whatever an audit refused."""
    return [
        f"{row.model}, {row.dtype}: {row.reason or row.status}"
        for row in report.all_rows
        if (row.status != "ok" and getattr(row, "engine", "gemma-runtime") == "gemma-runtime")
        or (row.audit is not None and not row.audit.passed)
    ]


def _measured(report: Report) -> str | None:
    """Which configuration the headline is about."""
    row = next((row for row in report.rows if row.decode_tokens_per_s is not None and row.audit is not None), None)
    if row is None or row.decode_tokens_per_s is None:
        return None
    return f"{row.dtype}, {plots.sizes(row)}; the median of {len(row.decode_tokens_per_s.values)} runs."


def _conditions(report: Report) -> list[tuple[str, str]]:
    """What the numbers depend on, by name."""
    fields = report.environment.flat().items()
    return [(name.replace("_", " "), str(value)) for name, value in fields if value is not None]

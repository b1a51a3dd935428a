"""`bench export REPORT`: a finished report in a form that other tools read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from runtime.bench.diff import times
from runtime.bench.html import page
from runtime.bench.records import Report


def github_action_benchmark(report: Report) -> str:
    """The input of github-action-benchmark for its tool "customSmallerIsBetter": the median of every time that has
    samples, with the middle half of them as its range."""
    entries, machine = [], report.environment
    for (configuration, quantity), samples in times(report).items():
        kind, unit = quantity.rsplit(", ", 1)
        low, high = samples.quarters
        extra = f"{len(samples.values)} samples, {machine.device_name}, commit {machine.commit}"
        entry = {"name": f"{configuration}: {kind}", "unit": unit, "value": samples.p50}
        entries.append(entry | {"range": f"{low:.4g} to {high:.4g}", "extra": extra})
    if not entries:
        names = ", ".join(row.name for row in report.all_rows)
        raise ValueError(f"expected a report with times, got one with none: {names}")
    return json.dumps(entries, indent=1) + "\n"


def as_csv(report: Report) -> str:
    """One line per row: plain fields, the percentiles of each quantity and its raw samples, separated by spaces."""
    whole = report.model_dump(include={"schema_version", "command", "time", "environment"})
    lines = [dict(_flat(whole | row.model_dump(exclude={"parts"}))) for row in report.all_rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            prefix = "" if name == "environment" else f"{name}_"
            yield from ((f"{prefix}{part}", found) for part, found in _flat(value))
        else:
            yield name, " ".join(map(str, value)) if isinstance(value, tuple) else value


FORMS: dict[str, Callable[[Report], str]] = {
    "json": Report.to_json,
    "github-action-benchmark": github_action_benchmark,
    "csv": as_csv,
    "html": page,
}

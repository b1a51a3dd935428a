"""`bench export REPORT`: a finished report in a form that other tools read."""

from __future__ import annotations

import json
from collections.abc import Callable

from runtime.bench.diff import name_of, times
from runtime.bench.html import page
from runtime.bench.records import Report
from runtime.bench.table import as_csv


def github_action_benchmark(report: Report) -> str:
    """What github-action-benchmark takes as its tool "customSmallerIsBetter": the median of every time that has
    samples, with the middle half of them as its range."""
    entries, machine = [], report.environment
    for (configuration, quantity), samples in times(report).items():
        kind, unit = quantity.rsplit(", ", 1)
        low, high = samples.quarters
        entries.append(
            {
                "name": f"{configuration}: {kind}",
                "unit": unit,
                "value": samples.p50,
                "range": f"{low:.4g} to {high:.4g}",
                "extra": f"{len(samples.values)} samples, {machine.device_name}, commit {machine.commit}",
            }
        )
    if not entries:
        raise ValueError(f"expected a report with times, got one with none: {', '.join(map(name_of, report.all_rows))}")
    return json.dumps(entries, indent=1) + "\n"


FORMS: dict[str, Callable[[Report], str]] = {
    "github-action-benchmark": github_action_benchmark,
    "csv": as_csv,
    "html": page,
}

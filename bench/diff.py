"""`bench diff A B`: what changed between two reports, with confidence intervals from their samples.

Exit codes: 0 nothing in B is slower beyond noise; 1 something is slower, its whole 95 % interval above the bound (1, or
1.05 with --fail-above 5%), or failed; 2 nothing could be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from runtime.bench.records import AnyRow, InFlightRow, KernelRow, Report, Samples
from runtime.bench.statistics import median_ratio_interval
from runtime.bench.table import aligned

SLOWER, INCOMPARABLE = 1, 2
LEAST_SAMPLES = 5  # with fewer, an interval of medians is hardly narrower than the range of the samples
TOO_FEW = "too few samples"
SLOWER_B = "B slower"


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


def changes(a: Report, b: Report) -> Iterator[Change]:
    """Every time for which both reports have samples."""
    theirs = times(b)
    for key, before in times(a).items():
        if key not in theirs:
            continue
        after = theirs[key]
        ratio, low, high = median_ratio_interval(before.values, after.values)
        verdict = "no difference" if low <= 1 <= high else "B faster" if high < 1 else SLOWER_B
        if min(len(before.values), len(after.values)) < LEAST_SAMPLES:
            verdict = f"{TOO_FEW}: {len(before.values)} and {len(after.values)}, expected {LEAST_SAMPLES} or more"
        yield Change(*key, before.p50, after.p50, ratio, low, high, verdict)


def lost(a: Report, b: Report) -> list[str]:
    """Configurations that A has times for and that failed in B, each with the reason."""
    timed = {configuration for configuration, _ in times(a)}
    return [f"{name_of(row)} ({row.status})" for row in b.all_rows if row.status != "ok" and name_of(row) in timed]


def exit_code(a: Report, b: Report, found: list[Change], allowed: float = 0.0) -> int:
    """The exit code of the command.

    Args:
        a, b: the reports.
        found: their changes.
        allowed: by how much B may be slower: 0.05 for five per cent.
    """
    if lost(a, b) or any(change.verdict == SLOWER_B and change.low > 1 + allowed for change in found):
        return SLOWER
    return INCOMPARABLE if all(change.verdict.startswith(TOO_FEW) for change in found) else 0


def render(a: Report, b: Report, found: list[Change], *, markdown: bool = False) -> str:
    """The differences between the environments, as a list if Markdown is wanted, then the changes as a table.

    Raises:
        ValueError: the reports have nothing in common.
    """
    check_comparable(a, b, found)
    heading = ["configuration", "time", "A", "B", "B / A", "95 % interval", ""]
    lines = [
        [
            change.configuration,
            change.quantity,
            f"{change.a:,.3f}",
            f"{change.b:,.3f}",
            f"{change.ratio:.3f}",
            f"{change.low:.3f} to {change.high:.3f}",
            change.verdict,
        ]
        for change in found
    ]
    remarks = [*_environments(a, b), *_alone(a, b), *(f"no time in B: {name}" for name in lost(a, b))]
    if markdown:
        remarks = [f"- {line}" for line in remarks]
    return "\n".join([*remarks, "", *aligned(heading, lines), ""])


def to_json(a: Report, b: Report, found: list[Change], code: int) -> str:
    """The same as one JSON document: exit_code, environments, only_in, lost, and changes with their intervals.

    Raises:
        ValueError: as `render`.
    """
    check_comparable(a, b, found)
    content = {
        "exit_code": code,
        "environments": list(_environments(a, b)),
        "only_in": list(_alone(a, b)),
        "lost": lost(a, b),
        "changes": [asdict(change) for change in found],
    }
    return json.dumps(content, indent=1) + "\n"


def check_comparable(a: Report, b: Report, found: list[Change]) -> None:
    """Refuses reports of other configurations."""
    if not found and not lost(a, b):
        raise ValueError("expected two reports of the same configurations, got none in common")


def _alone(a: Report, b: Report) -> Iterator[str]:
    """What is in one report alone."""
    before, after = (set(times(report)) for report in (a, b))
    for name, keys in (("A", before - after), ("B", after - before)):
        yield from (f"only in {name}: {configuration}" for configuration in sorted({key[0] for key in keys}))


def name_of(row: AnyRow) -> str:
    """A configuration's name."""
    if isinstance(row, InFlightRow):
        sizes = f"{row.rows} rows pp{row.prompt_len} tg{row.gen_len}, pp{row.arrival_len} arriving"
        return f"in flight: {row.model}, {row.dtype}, {sizes}"
    if isinstance(row, KernelRow):
        return f"{row.kernel}: {row.model}, {row.dtype}, {row.shape}"
    sizes = f"b{row.batch_size} pp{row.prompt_len} tg{row.gen_len}"
    return f"{row.benchmark}: {row.engine}, {row.model}, {row.dtype}, {sizes}"


def times(report: Report) -> dict[tuple[str, str], Samples]:
    """The samples to compare, by configuration and quantity.

    One sample per request: the gaps within one answer are not independent of each other, so they are not resampled.
    """
    found = {}
    for row in report.rows:
        for quantity, samples in (("TTFT, ms", row.ttft_ms), ("TPOT, ms", row.tpot_ms)):
            if samples is not None:
                found[name_of(row), quantity] = samples
    for kernel in report.kernels:
        for quantity, samples in (("operation, us", kernel.time_us), ("PyTorch, us", kernel.torch_us)):
            if samples is not None:
                found[name_of(kernel), quantity] = samples
    for shared in report.in_flight:
        for quantity, rates in (
            ("time per token, steps of all rows, ms", shared.decode_tokens_per_s),
            ("time per token, whole run, ms", shared.output_tokens_per_s),
        ):
            if rates is not None:
                found[name_of(shared), quantity] = Samples(values=tuple(1e3 / rate for rate in rates.values))
    return found


def _environments(a: Report, b: Report) -> Iterator[str]:
    """The differences between the two environments, except clocks and load, which always differ a little."""
    ours, theirs = (report.environment.model_dump(exclude={"clocks_mhz"}) for report in (a, b))
    for name in ours:
        pairs = [(name, ours[name], theirs[name])]
        if name == "versions":
            names = sorted({*ours[name], *theirs[name]})
            pairs = [(part, ours[name].get(part), theirs[name].get(part)) for part in names]
        yield from (f"{part}: A {before}, B {after}" for part, before, after in pairs if before != after)

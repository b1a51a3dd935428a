"""`bench diff A B`: what changed between two reports, with confidence intervals from their samples.

Exit codes: 0 nothing in B is slower beyond noise; 1 something is slower, its whole 95 % interval above 1, or failed; 2
nothing could be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runtime.bench.records import AnyRow, InFlightRow, KernelRow, Report, Samples
from runtime.bench.statistics import median_ratio_interval
from runtime.bench.table import aligned

SLOWER, INCOMPARABLE = 1, 2
LEAST_SAMPLES = 5  # with fewer, an interval of medians is hardly narrower than the range of the samples
TOO_FEW = "too few samples"


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
    theirs = _samples(b)
    for key, before in _samples(a).items():
        if key not in theirs:
            continue
        after = theirs[key]
        ratio, low, high = median_ratio_interval(before.values, after.values)
        verdict = "no difference" if low <= 1 <= high else "B faster" if high < 1 else "B slower"
        if min(len(before.values), len(after.values)) < LEAST_SAMPLES:
            verdict = f"{TOO_FEW}: {len(before.values)} and {len(after.values)}, expected {LEAST_SAMPLES} or more"
        yield Change(*key, before.p50, after.p50, ratio, low, high, verdict)


def lost(a: Report, b: Report) -> list[str]:
    """Configurations that A has times for and that failed in B, each with the reason."""
    timed = {configuration for configuration, _ in _samples(a)}
    return [f"{_name(row)} ({row.status})" for row in b.all_rows if row.status != "ok" and _name(row) in timed]


def exit_code(a: Report, b: Report, found: list[Change]) -> int:
    """The exit code of the command.

    Args:
        a, b: the reports.
        found: their changes.
    """
    if lost(a, b) or any(change.verdict == "B slower" for change in found):
        return SLOWER
    return INCOMPARABLE if all(change.verdict.startswith(TOO_FEW) for change in found) else 0


def render(a: Report, b: Report, found: list[Change]) -> str:
    """The differences between the environments, then the changes as a table.

    Raises:
        ValueError: the reports have nothing in common.
    """
    if not found and not lost(a, b):
        raise ValueError("expected two reports of the same configurations, got none in common")
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
    before, after = (set(_samples(report)) for report in (a, b))
    alone = [
        f"only in {name}: {configuration}"
        for name, keys in (("A", before - after), ("B", after - before))
        for configuration in sorted({key[0] for key in keys})
    ]
    gone = [f"no time in B: {configuration}" for configuration in lost(a, b)]
    return "\n".join([*_environments(a, b), *alone, *gone, "", *aligned(heading, lines), ""])


def _name(row: AnyRow) -> str:
    """A configuration's name."""
    if isinstance(row, InFlightRow):
        sizes = f"{row.rows} rows pp{row.prompt_len} tg{row.gen_len}, pp{row.arrival_len} arriving"
        return f"in flight: {row.model}, {row.dtype}, {sizes}"
    if isinstance(row, KernelRow):
        return f"{row.kernel}: {row.model}, {row.dtype}, {row.shape}"
    sizes = f"b{row.batch_size} pp{row.prompt_len} tg{row.gen_len}"
    return f"{row.benchmark}: {row.engine}, {row.model}, {row.dtype}, {sizes}"


def _samples(report: Report) -> dict[tuple[str, str], Samples]:
    """The samples to compare, by configuration and quantity.

    One sample per request: the gaps within one answer are not independent of each other, so they are not resampled.
    """
    found = {}
    for row in report.rows:
        for quantity, samples in (("TTFT, ms", row.ttft_ms), ("TPOT, ms", row.tpot_ms)):
            if samples is not None:
                found[_name(row), quantity] = samples
    for kernel in report.kernels:
        for quantity, samples in (("operation, us", kernel.time_us), ("PyTorch, us", kernel.torch_us)):
            if samples is not None:
                found[_name(kernel), quantity] = samples
    for shared in report.in_flight:
        for quantity, rates in (
            ("time per token, steps of all rows, ms", shared.decode_tokens_per_s),
            ("time per token, whole run, ms", shared.output_tokens_per_s),
        ):
            if rates is not None:
                found[_name(shared), quantity] = Samples(values=tuple(1e3 / rate for rate in rates.values))
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

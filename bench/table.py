"""A report as a table like llama-bench's, and as CSV.

`pp512` is the prefill of a prompt of 512 tokens, `tg128 @ d512` the decoding of 128 tokens after it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from runtime.bench.records import (
    LEAST_DECODE_RATIO,
    LEAST_GAPS,
    AnyRow,
    Environment,
    InFlightRow,
    KernelRow,
    Report,
    Row,
    Samples,
)
from runtime.bench.statistics import WIDE_SPREAD

HEADING = [
    "engine", "model", "dtype", "batch", "test", "t/s", "spread", "ms p50", "p90", "p95", "p99", "GB/s", "of read",
    "of datasheet", "memory, MB", "tokens equal",
]  # fmt: skip
WIDE = {"p90", "p95", "p99", "GB/s", "of datasheet", "memory, MB"}  # columns that the narrow table leaves out
KERNEL_HEADING = ["kernel", "model", "dtype", "shape", "us", "spread", "GB/s", "of read", "PyTorch, us", "ratio"]
IN_FLIGHT_HEADING = [
    "in flight", "model", "dtype", "rows", "t/s", "static t/s", "ratio", "spread", "of read", "ms p50", "p99", "max",
    "step, ms", "budget, ms", "limit, ms",
]  # fmt: skip


Line = dict[str, str]  # the cells of a line by their columns
Table = tuple[list[str], list[list[str]]]


def markdown(report: Report, *, wide: bool = False) -> str:
    """The whole report: a headline, the machine, tables, and notes.

    Args:
        report: a finished run.
        wide: whether the table has every column, and the notes every load and wide spread.
    """
    lines = [*headline(report), *machine(report.environment), ""]
    for heading, found in (row_table(report, wide=wide), kernel_table(report), in_flight_table(report)):
        lines += [*aligned(heading, found), ""] if found else []
    return "\n".join([*lines, *notes(report, wide=wide), *map(_without_samples, report.in_flight), ""])


def headline(report: Report) -> list[str]:
    """This runtime's first row in a line: its speed, its share of the read bandwidth, and the audit's verdict."""
    row = next((row for row in report.rows if row.decode_tokens_per_s is not None and row.audit is not None), None)
    if row is None or row.decode_tokens_per_s is None or row.audit is None:
        return []
    share = "" if row.share_of_read_bandwidth is None else f", {row.share_of_read_bandwidth:.0%} of the read bandwidth"
    parity = "passed" if row.audit.passed else "refused"
    return [f"{row.decode_tokens_per_s.p50:,.1f} tokens/s{share}, parity {parity}", ""]


def aligned(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also line up in a terminal; all but the first are right-aligned."""
    widths = [max(3, *(len(row[column]) for row in [heading, *rows])) for column in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return [line(heading), rule, *map(line, rows)]


def row_table(report: Report, *, wide: bool = True) -> Table:
    """HEADING and the lines of all rows, without empty columns and, unless it is to be wide, without those of WIDE. A
    prompt's prefill has one line, whatever the lengths of the answers after it."""
    lines, prefilled = [], set()
    for line in (line for row in report.rows for line in cells(row)):
        prefill = tuple(line.values())[:5] if line["test"].startswith("pp") else None
        if prefill is None or prefill not in prefilled:
            lines.append(line)
        prefilled.add(prefill)
    return _filled([name for name in HEADING if wide or name not in WIDE], lines)


def kernel_table(report: Report) -> Table:
    """KERNEL_HEADING and the lines of all kernel rows, without empty columns."""
    return _filled(KERNEL_HEADING, map(kernel_cells, report.kernels))


def in_flight_table(report: Report) -> Table:
    """IN_FLIGHT_HEADING and the lines of all rows of requests in flight, without empty columns."""
    return _filled(IN_FLIGHT_HEADING, (line for row in report.in_flight for line in in_flight_cells(row)))


def _filled(heading: Sequence[str], lines: Iterable[Line]) -> Table:
    """A table of lines, without the columns in which none has anything."""
    found = list(lines)
    kept = [name for name in heading if any(line.get(name) for line in found)]
    return kept, [[line.get(name, "") for name in kept] for line in found]


def machine(environment: Environment) -> list[str]:
    """What the numbers depend on, in two lines."""
    clock = f", {environment.clocks_mhz:,.0f} MHz" if environment.clocks_mhz else ""
    driver = f", driver {environment.driver}" if environment.driver else ""
    installed = ", ".join(f"{name} {version}" for name, version in environment.versions.items() if version)
    return [
        f"{environment.device_name} ({environment.device}){clock}{driver}, {environment.cores} cores, "
        f"{environment.threads} threads, load average {environment.load_average:.2f}",
        f"{installed}, commit {environment.commit or 'unknown'}",
    ]


def notes(report: Report, *, wide: bool = True) -> list[str]:
    """The ceiling, the audits, the rows without numbers and why, loads, and wide spreads: one line for all of these
    unless the report is to be wide."""
    rates = sorted({rate for row in report.all_rows for rate in _readings(row)})
    found = []
    if rates:
        stated, how = report.environment.datasheet_gb_s, report.environment.read_bandwidth
        read = f"{rates[0]:,.1f}" + (f" to {rates[-1]:,.1f}" if len(rates) > 1 else "") + " GB/s"
        named = f"read bandwidth: {read} by {how}, before every run" if how else f"read bandwidth: {read}"
        found.append(named + (f"; datasheet {stated:,.0f}" if stated else ""))
    audits = dict.fromkeys((row.model, row.dtype, row.audit) for row in report.all_rows if row.audit is not None)
    for model, dtype, audit in audits:
        found.append(f"parity, {model} in {dtype}: {audit.verdict}")
    found += dict.fromkeys(f"{row.engine}, {row.dtype}: {row.reason}" for row in report.rows if row.reason)
    for shared in report.in_flight:
        found += in_flight_notes(shared)
    loads = {
        f"{row.engine}, {row.dtype}: load {row.load_s:,.2f} s, first call {row.first_call_s:,.2f} s "
        f"(pp{row.prompt_len} tg{row.gen_len}, batch {row.batch_size})": row.load_s
        for row in report.rows
        if row.load_s is not None and row.first_call_s is not None
    }
    if wide or len(loads) <= 1:
        found += loads
    else:
        found.append(f"loads took {min(loads.values()):,.2f} to {max(loads.values()):,.2f} s")
    return found + _spread_warnings(report, wide)


def _readings(row: AnyRow) -> tuple[float, ...]:
    """The readings of a row's ceiling; of an older report the one that it has."""
    if row.read_bandwidth_readings_gb_s is not None:
        return row.read_bandwidth_readings_gb_s.values
    return () if row.read_bandwidth_gb_s is None else (row.read_bandwidth_gb_s,)


def _spread_warnings(report: Report, wide: bool) -> list[str]:
    """A warning for every time that spreads widely, or one for all."""
    timed: list[tuple[str, Samples | None]] = []
    for row in report.rows:
        named = f"{row.engine}, {row.dtype}, {test(row)}"
        timed += [(f"TTFT of {named}", row.ttft_ms), (f"TPOT of {named}", row.tpot_ms)]
    timed += [(f"{kernel.kernel}, {kernel.shape}", kernel.time_us) for kernel in report.kernels]
    spreads = {name: samples.spread for name, samples in timed if samples and samples.spread > WIDE_SPREAD}
    if wide or len(spreads) <= 1:
        return [
            f"warning: {name} spreads {spread:.0%} around its median: the machine was not quiet"
            for name, spread in spreads.items()
        ]
    name, widest = max(spreads.items(), key=lambda spread: spread[1])
    return [
        f"warning: {len(spreads)} times spread more than {WIDE_SPREAD:.0%} around their medians, most of all {name} "
        f"({widest:.0%}): the machine was not quiet"
    ]


def test(row: Row) -> str:
    """A row's decoding in llama-bench's notation."""
    return f"tg{row.gen_len} @ d{row.prompt_len}" + (f" b{row.batch_size}" if row.batch_size > 1 else "")


def cells(row: Row) -> Iterator[Line]:
    """A row's lines: prefill, decoding and, for a file of prompts, both together."""
    named = {"engine": row.engine, "model": row.model, "dtype": row.dtype, "batch": str(row.batch_size)}
    if row.ttft_ms is None or row.inter_token_ms is None or row.tpot_ms is None:
        yield named | {"test": row.status}
        return
    prefill, decode = _rate(row.prefill_tokens_per_s, row.ttft_ms), _rate(row.decode_tokens_per_s, row.tpot_ms)
    yield named | {"test": f"pp{row.prompt_len}"} | prefill | _times(row.ttft_ms)
    ceiling = _ceiling(row) | {"of datasheet": _share(row.share_of_datasheet)}
    memory = {"memory, MB": "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:,.0f}"}
    equal = {"tokens equal": _share(row.equal_tokens)}
    named_test = {"test": f"tg{row.gen_len} @ d{row.prompt_len}"}
    yield named | named_test | decode | _times(row.inter_token_ms) | ceiling | memory | equal
    if row.output_tokens_per_s is not None:
        yield named | {"test": f"{row.requests} requests"} | _rate(row.output_tokens_per_s)


def _rate(rate: Samples | None, spread_of: Samples | None = None) -> Line:
    assert rate is not None, "a row has all of its numbers or none"
    return {"t/s": _p50(rate), "spread": f"{(spread_of or rate).spread:.1%}"}


def _times(samples: Samples) -> Line:
    """Percentiles; the 99th only of so many samples that it says anything."""
    shown = {"ms p50": samples.p50, "p90": samples.p90, "p95": samples.p95}
    if len(samples.values) >= LEAST_GAPS:
        shown["p99"] = samples.p99
    return {name: _time(value) for name, value in shown.items()}


def _ceiling(row: Row | KernelRow) -> Line:
    achieved = "" if row.achieved_gb_s is None else f"{row.achieved_gb_s:,.1f}"
    return {"GB/s": achieved, "of read": _share(row.share_of_read_bandwidth)}


def kernel_cells(row: KernelRow) -> Line:
    """A row's line."""
    named = {"kernel": row.kernel, "model": row.model, "dtype": row.dtype, "shape": row.shape}
    if row.time_us is None:
        return named | {"us": row.status}
    line = named | {"us": _p50(row.time_us), "spread": f"{row.time_us.spread:.1%}"} | _ceiling(row)
    if row.torch_us is not None:
        line |= {"PyTorch, us": _p50(row.torch_us), "ratio": f"{row.torch_us.p50 / row.time_us.p50:.2f}"}
    return line


def in_flight_cells(row: InFlightRow) -> Iterator[Line]:
    """A row's lines: steps of all rows, the whole run, and the gaps between tokens."""
    named = {"model": row.model, "dtype": row.dtype, "rows": str(row.rows)}
    if row.status != "ok":
        yield {"in flight": row.status} | named
        return
    for what, rate, static, ratio in (
        ("steps of all rows", row.decode_tokens_per_s, row.static_decode_tokens_per_s, row.decode_ratio),
        (f"{row.requests} requests", row.output_tokens_per_s, row.static_output_tokens_per_s, row.output_ratio),
    ):
        line = _rate(ratio) | {"ratio": _p50(ratio), "t/s": _p50(rate), "static t/s": _p50(static)}
        of_read = _share(row.share_of_read_bandwidth) if rate is row.decode_tokens_per_s else ""
        yield {"in flight": what} | named | line | {"of read": of_read}
    gaps = {"p99": _time(row.inter_token_p99_ms), "max": _time(row.inter_token_max_ms)}
    limits = {"step, ms": _p50(row.step_ms), "budget, ms": _p50(row.budget_ms), "limit, ms": _time(row.limit_ms)}
    yield {"in flight": f"pp{row.arrival_len} arriving"} | named | {"ms p50": _p50(row.inter_token_ms)} | gaps | limits


def in_flight_notes(row: InFlightRow) -> Iterator[str]:
    """Why a row has no or fewer numbers, and whether those it has meet what is expected of them."""
    named = f"{row.model}, {row.dtype}"
    if row.reason:
        yield f"{named}: {row.reason}"
    if row.decode_ratio is not None and row.inter_token_ms is not None:
        yield (
            f"{named}: decode rate of all rows in flight / static batch >= {LEAST_DECODE_RATIO:.2f}: "
            f"{_verdict(row.meets_decode_ratio)} ({row.decode_ratio.p50:.3f})"
        )
        yield (
            f"{named}: p99 between tokens while prompts arrive <= two steps and {row.budget_tokens} tokens of prefill: "
            f"{_verdict(row.meets_limit)} ({len(row.inter_token_ms.values)} gaps, {row.arrivals} prompts)"
        )


def _verdict(is_met: bool | None) -> str:
    return "too few samples" if is_met is None else "met" if is_met else "not met"


def _without_samples(row: InFlightRow) -> str:
    """A row's figures as one line of JSON: of samples, one a round and few, the median and the spread."""
    left_out = {"values", "p90", "p95", "p99"}
    samples = {name: left_out for name, value in row if isinstance(value, Samples)}
    return row.model_dump_json(exclude=samples, exclude_none=True)


def _p50(samples: Samples | None) -> str:
    return _time(None if samples is None else samples.p50)


def _time(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def as_csv(report: Report) -> str:
    """One line per row: plain fields, the percentiles of each quantity and its raw samples, separated by spaces."""
    flat = [
        {"schema_version": report.schema_version, "command": report.command, "time": report.time}
        | dict(_flat(report.environment.model_dump()))
        | dict(_flat(row.model_dump(exclude={"parts"})))
        for row in report.all_rows
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in flat for name in row)))
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from ((f"{name}_{part}", found) for part, found in _flat(value))
        elif isinstance(value, tuple):
            yield name, " ".join(map(str, value))
        else:
            yield name, value

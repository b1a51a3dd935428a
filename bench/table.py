"""A report as tables like llama-bench's, between a headline and notes.

`pp512` is the prefill of a prompt of 512 tokens, `tg128 @ d512` the decoding of 128 tokens after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from runtime.bench.records import LEAST_DECODE_RATIO, LEAST_GAPS, InFlightRow, KernelRow, Report, Row, Samples

WIDE = {"p90", "p95", "p99", "GB/s", "of datasheet", "memory, MB"}  # columns that the narrow table leaves out
WIDE_SPREAD = 0.1  # interquartile range over median above which a time gets a warning

Line = dict[str, str]  # the cells of a line by their columns
Table = tuple[list[str], list[list[str]]]


def markdown(report: Report, *, wide: bool = False) -> str:
    """The whole report: a headline, the machine, tables, and notes.

    Args:
        report: a finished run.
        wide: whether the table has every column, and the notes every load and wide spread.
    """
    lines = [*headline(report), *machine(report), ""]
    for table in tables(report, wide=wide).values():
        lines += [*aligned(*table), ""]
    return "\n".join([*lines, *notes(report, wide=wide), ""])


def headline(report: Report) -> list[str]:
    """This runtime's first row in a line: its speed, its share of the read bandwidth, and the audit's verdict."""
    row = next((row for row in report.rows if row.decode_tokens_per_s is not None and row.audit is not None), None)
    if row is None or row.decode_tokens_per_s is None or row.audit is None:
        return []
    share = "" if row.share_of_read_bandwidth is None else f", {row.share_of_read_bandwidth:.0%} of the read bandwidth"
    parity = "passed" if row.audit.passed else "refused"
    return [f"{row.decode_tokens_per_s.p50:,.1f} tokens/s{share}, parity {parity}", ""]


def machine(report: Report) -> list[str]:
    """What the numbers depend on, in two lines."""
    where = report.environment
    clock = f", {where.clocks_mhz:,.0f} MHz" if where.clocks_mhz else ""
    driver = f", driver {where.driver}" if where.driver else ""
    installed = ", ".join(f"{name} {version}" for name, version in where.versions.items() if version)
    return [
        f"{where.device_name} ({where.device}){clock}{driver}, {where.cores} cores, {where.threads} threads, load "
        f"average {where.load_average:.2f}",
        f"{installed}, commit {where.commit or 'unknown'}",
    ]


def tables(report: Report, *, wide: bool = True) -> dict[str, Table]:
    """The tables for the kinds of rows that the report has, by title. A prompt's prefill has one line, whatever the
    lengths of the answers after it."""
    lines: list[Line] = []
    prefilled = set()
    for line in (line for row in report.rows for line in row_lines(row)):
        configuration = tuple(line.values())[:5]
        if configuration not in prefilled:
            lines.append(line)
        if line["test"].startswith("pp"):
            prefilled.add(configuration)
    found = {
        "Prefill (pp) and decoding (tg)": table_of(lines, set() if wide else WIDE),
        "Kernels": table_of(map(kernel_line, report.kernels)),
        "Rows in flight": table_of(line for row in report.in_flight for line in in_flight_lines(row)),
    }
    return {title: table for title, table in found.items() if table[1]}


def table_of(lines: Iterable[Line], left_out: Iterable[str] = ()) -> Table:
    """The heading and the cells of some lines, without columns that are to be left out or that are empty."""
    found = list(lines)
    names = dict.fromkeys(name for line in found for name, cell in line.items() if cell)
    kept = [name for name in names if name not in left_out]
    return kept, [[line.get(name, "") for name in kept] for line in found]


def aligned(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also line up in a terminal; all but the first are right-aligned."""
    widths = [max(3, *(len(row[column]) for row in [heading, *rows])) for column in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return [line(heading), rule, *map(line, rows)]


def row_lines(row: Row) -> Iterator[Line]:
    """A row's lines: prefill, decoding and, for a file of prompts, both together."""
    named = {"engine": row.engine, "model": row.model, "dtype": row.dtype, "batch": str(row.batch_size)}
    if row.ttft_ms is None or row.inter_token_ms is None:
        yield named | {"test": row.status}
        return
    prefill = {"t/s": _cell(row.prefill_tokens_per_s), "spread": _spread(row.ttft_ms)}
    yield named | {"test": f"pp{row.prompt_len}"} | prefill | _times(row.ttft_ms)
    decode = {"t/s": _cell(row.decode_tokens_per_s), "spread": _spread(row.tpot_ms)}
    decode |= _times(row.inter_token_ms) | _ceiling(row)
    more = {
        "of datasheet": _cell(row.share_of_datasheet, ".1%"),
        "memory, MB": _cell(row.peak_memory_mb, ",.0f"),
        "tokens equal": _cell(row.equal_tokens, ".1%"),
    }
    yield named | {"test": f"tg{row.gen_len} @ d{row.prompt_len}"} | decode | more
    if row.output_tokens_per_s is not None:
        rate = {"t/s": _cell(row.output_tokens_per_s), "spread": _spread(row.output_tokens_per_s)}
        yield named | {"test": f"{row.requests} requests"} | rate


def kernel_line(row: KernelRow) -> Line:
    """A row's line."""
    named = {"kernel": row.kernel, "model": row.model, "dtype": row.dtype, "shape": row.shape}
    if row.time_us is None:
        return named | {"us": row.status}
    line = named | {"us": _cell(row.time_us), "spread": _spread(row.time_us)} | _ceiling(row)
    if row.torch_us is not None:
        line |= {"PyTorch, us": _cell(row.torch_us), "ratio": _cell(row.torch_us.p50 / row.time_us.p50)}
    return line


def in_flight_lines(row: InFlightRow) -> Iterator[Line]:
    """A row's lines: steps of all rows, the whole run, and the gaps between tokens."""
    named = {"model": row.model, "dtype": row.dtype, "rows": str(row.rows)}
    if row.status != "ok":
        yield {"in flight": row.status} | named
        return
    of_read = row.share_of_read_bandwidth
    for what, rate, static, ratio, share in (
        ("steps of all rows", row.decode_tokens_per_s, row.static_decode_tokens_per_s, row.decode_ratio, of_read),
        (f"{row.requests} requests", row.output_tokens_per_s, row.static_output_tokens_per_s, row.output_ratio, None),
    ):
        line = {"t/s": _cell(rate), "static t/s": _cell(static), "ratio": _cell(ratio), "spread": _spread(ratio)}
        yield {"in flight": what} | named | line | {"of read": _cell(share, ".1%")}
    gaps = {
        "ms p50": _cell(row.inter_token_ms),
        "p99": _cell(row.inter_token_p99_ms),
        "max": _cell(row.inter_token_max_ms),
    }
    limits = {"step, ms": _cell(row.step_ms), "budget, ms": _cell(row.budget_ms), "limit, ms": _cell(row.limit_ms)}
    yield {"in flight": f"pp{row.arrival_len} arriving"} | named | gaps | limits


def _times(samples: Samples) -> Line:
    """Percentiles; the 99th only where there are enough samples for it."""
    shown = {"ms p50": samples.p50, "p90": samples.p90, "p95": samples.p95}
    shown |= {"p99": samples.p99} if len(samples.values) >= LEAST_GAPS else {}
    return {name: _cell(value) for name, value in shown.items()}


def _ceiling(row: Row | KernelRow) -> Line:
    return {"GB/s": _cell(row.achieved_gb_s, ",.1f"), "of read": _cell(row.share_of_read_bandwidth, ".1%")}


def _cell(value: Samples | float | None, form: str = ",.2f") -> str:
    """A number, the median of samples, or nothing."""
    value = value.p50 if isinstance(value, Samples) else value
    return "" if value is None else format(value, form)


def _spread(samples: Samples | None) -> str:
    return "" if samples is None else f"{samples.spread:.1%}"


def notes(report: Report, *, wide: bool = True) -> list[str]:
    """The ceiling, the audits, the rows without numbers and why, loads, and wide spreads: one line for all of these
    unless the report is to be wide."""
    found = []
    readings = [row.read_bandwidth_readings_gb_s or row.read_bandwidth_gb_s for row in report.all_rows]
    rates = [rate for read in readings if read for rate in (read.values if isinstance(read, Samples) else (read,))]
    if rates:
        stated, how = report.environment.datasheet_gb_s, report.environment.read_bandwidth
        ends = " to ".join(dict.fromkeys(f"{end(rates):,.1f}" for end in (min, max)))
        found.append(f"read bandwidth: {ends} GB/s" + (f" by {how}, before every run" if how else ""))
        found[-1] += f"; datasheet {stated:,.0f}" if stated else ""
    audits = dict.fromkeys(
        (row.model, row.dtype, row.audit.verdict) for row in report.all_rows if row.audit is not None
    )
    found += [f"parity, {model} in {dtype}: {verdict}" for model, dtype, verdict in audits]
    found += dict.fromkeys(
        f"{getattr(row, 'engine', row.model)}, {row.dtype}: {row.reason}" for row in report.all_rows if row.reason
    )
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


def _spread_warnings(report: Report, wide: bool) -> list[str]:
    """A warning for every time that spreads widely, or one for all."""
    timed: list[tuple[str, Samples | None]] = []
    for row in report.rows:
        batch = f" b{row.batch_size}" if row.batch_size > 1 else ""
        named = f"{row.engine}, {row.dtype}, tg{row.gen_len} @ d{row.prompt_len}{batch}"
        timed += [(f"TTFT of {named}", row.ttft_ms), (f"TPOT of {named}", row.tpot_ms)]
    timed += [(f"{kernel.kernel}, {kernel.shape}", kernel.time_us) for kernel in report.kernels]
    spreads = {name: samples.spread for name, samples in timed if samples and samples.spread > WIDE_SPREAD}
    cause = "the machine was not quiet"
    if wide or len(spreads) <= 1:
        return [f"warning: {name} spreads {spread:.0%} around its median: {cause}" for name, spread in spreads.items()]
    name, widest = max(spreads.items(), key=lambda spread: spread[1])
    many = f"{len(spreads)} times spread more than {WIDE_SPREAD:.0%} around their medians"
    return [f"warning: {many}, most of all {name} ({widest:.0%}): {cause}"]


def in_flight_notes(row: InFlightRow) -> Iterator[str]:
    """Whether the numbers of a row meet what is expected of them."""
    named = f"{row.model}, {row.dtype}"
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

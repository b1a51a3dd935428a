"""The plots of a report, each as SVG to embed in a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from runtime.bench.records import Report, Row
from runtime.bench.table import test

WIDTH = 8.6  # inches
Figure = tuple[str, str, str]  # title, caption, SVG
COLOURS = (
    "#1b6ca8", "#d1495b", "#2e8b57", "#8c5fbf", "#c77d0a", "#4a4e57", "#17a2a8",
    "#7fb2d9", "#eba0a9", "#93cfae", "#c9b3e3", "#efc077", "#a9aeb8", "#8a6a4f",
)  # fmt: skip
DASHES: tuple[Any, ...] = ("--", ":", "-.", (0, (8, 2)), (0, (1, 4)), (0, (6, 2, 1, 2, 1, 2)))


def figures(report: Report) -> Iterator[Figure]:
    """The plots for which the report has numbers."""
    timed = [row for row in report.rows if row.status == "ok" and row.decode_tokens_per_s is not None]
    ours = [row for row in timed if row.engine == "gemma-runtime"]
    peers = [row for row in timed if row.benchmark == "compare"]
    if len({row.prompt_len for row in timed}) > 1 or (timed and not peers):
        caption = (
            "Medians with the middle half of the runs. Dashed: what the read bandwidth measured in this run allows."
        )
        yield "Decoding against context", caption, _svg(_context, timed, 3.6)
    if len({row.engine for row in peers}) > 1:
        groups = len({(row.dtype, row.prompt_len, row.gen_len) for row in peers})
        yield (
            "Peers side by side",
            "Medians with the middle half of the runs, engines alternating. Dashed: what the read bandwidth allows.",
            _svg(_peers, peers, 0.9 + 0.38 * len(peers) + 0.5 * groups),
        )
    if timed:
        shown = timed[:8]
        yield (
            "Time between two tokens",
            "Every gap of every run, the slowest percent left out." + _left_out(timed, shown),
            _svg(_histograms, shown, 0.7 + 0.85 * len(shown)),
        )
    with_stages = [row for row in ours if row.parts]
    if with_stages:
        shown = with_stages[:6]
        yield (
            "Where a token's time goes",
            "One decode step with each kind of operation timed on its own." + _left_out(with_stages, shown),
            _svg(_parts, shown, 1.3 + 0.5 * len(shown)),
        )
    timed_kernels = [row for row in report.kernels if row.time_us is not None]
    if timed_kernels:
        caption = "The share of the read bandwidth measured in this run."
        yield "Kernels", caption, _svg(_kernels, timed_kernels, 0.9 + 0.42 * len(timed_kernels))


def _left_out(rows: Sequence[Row], shown: Sequence[Row]) -> str:
    return f" The first {len(shown)} of {len(rows)} configurations." if len(rows) > len(shown) else ""


def _svg(draw: Callable[[Any, Any], None], rows: Any, height: float) -> str:
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    style: Any = {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": draw.__name__,  # fixed, so that equal reports give equal pages
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLOURS),
    }
    with rc_context(style):
        drawing = Drawing(figsize=(WIDTH, height), layout="constrained")
        draw(drawing, rows)
        out = io.StringIO()
        drawing.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _context(drawing: Any, rows: Sequence[Row]) -> None:
    axes = drawing.subplots()
    lines = list(dict.fromkeys((row.engine, row.model, row.dtype, row.batch_size) for row in rows))
    allowed: dict[tuple[str, str, int], dict[int, float]] = {}
    for engine, model, dtype, batch in lines:
        points = sorted(
            (
                (row.prompt_len + row.gen_len // 2, row)
                for row in rows
                if (row.engine, row.model, row.dtype, row.batch_size) == (engine, model, dtype, batch)
            ),
            key=lambda point: point[0],
        )
        _line(axes, points, f"{engine}, {dtype}" + (f", batch {batch}" if batch > 1 else ""))
        for place, row in points:
            assert row.bytes_per_token is not None and row.read_bandwidth_gb_s is not None
            allowed.setdefault((model, dtype, batch), {})[place] = row.read_bandwidth_gb_s * 1e9 / row.bytes_per_token
    for number, ((_, dtype, batch), ceiling) in enumerate(allowed.items()):
        # One point makes no line, so the ceiling extends a little to both sides of it.
        places = sorted(ceiling) if len(ceiling) > 1 else [place * by for place in ceiling for by in (0.7, 1.4)]
        rates = [ceiling[place] for place in sorted(ceiling)] * (1 if len(ceiling) > 1 else 2)
        name = f"bandwidth allows, {dtype}" + (f", batch {batch}" if batch > 1 else "")
        axes.plot(places, rates, linestyle=DASHES[number % len(DASHES)], linewidth=1.2, color="#777", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context in the middle of the answer, tokens")
    axes.set_ylabel("decoding, tokens/s")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _line(axes: Any, points: Sequence[tuple[int, Row]], label: str) -> None:
    rates = [row.decode_tokens_per_s for _, row in points]
    medians = [rate.p50 for rate in rates if rate is not None]
    spreads = [[abs(rate.p50 - rate.quarters[end]) for rate in rates if rate is not None] for end in (0, 1)]
    axes.errorbar([place for place, _ in points], medians, spreads, fmt="o-", markersize=4, capsize=3, label=label)


def _peers(drawing: Any, rows: Sequence[Row]) -> None:
    axes = drawing.subplots()
    groups = list(dict.fromkeys((row.dtype, row.prompt_len, row.gen_len) for row in rows))
    engines = list(dict.fromkeys(row.engine for row in rows))
    place, ticks, most = 0.0, [], 0.0
    for dtype, prompt_len, gen_len in groups:
        of_group = [row for row in rows if (row.dtype, row.prompt_len, row.gen_len) == (dtype, prompt_len, gen_len)]
        first = place
        for row in of_group:
            rate = row.decode_tokens_per_s
            assert rate is not None and row.bytes_per_token is not None and row.read_bandwidth_gb_s is not None
            low, high = rate.quarters
            axes.barh(
                place, rate.p50, 0.75, color=COLOURS[engines.index(row.engine) % len(COLOURS)],
                xerr=[[rate.p50 - low], [high - rate.p50]], error_kw={"elinewidth": 1, "capsize": 3, "ecolor": "#333"},
            )  # fmt: skip
            equal = (
                "" if row.equal_tokens is None or row.engine == "gemma-runtime" else f", {row.equal_tokens:.0%} equal"
            )
            _beside(axes, high, place, f"{rate.p50:,.1f}{equal}")
            ticks.append((place, f"{row.engine}\n{row.dtype}, {test(row)}" if row is of_group[0] else row.engine))
            most = max(most, high, row.read_bandwidth_gb_s * 1e9 / row.bytes_per_token)
            place += 1
        allowed = of_group[0].read_bandwidth_gb_s * 1e9 / of_group[0].bytes_per_token  # type: ignore[operator]
        axes.plot([allowed, allowed], [first - 0.5, place - 0.5], "--", color="#777")
        place += 0.6
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.18)
    axes.set_xlabel("decoding, tokens/s; beside it the share of tokens equal to gemma-runtime's")


def _beside(axes: Any, x: float, y: float, text: str) -> None:
    """Text a little to the right of where something ends."""
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=8)


def _histograms(drawing: Any, rows: Sequence[Row]) -> None:
    panels = drawing.subplots(len(rows), squeeze=False, sharex=True)[:, 0]
    kept = []
    for row in rows:
        assert row.inter_token_ms is not None
        kept.append([gap for gap in row.inter_token_ms.values if gap <= row.inter_token_ms.p99])
    low, high = min(map(min, kept)), max(map(max, kept))
    width = (high - low or high) / 60
    edges = [low + width * i for i in range(62)]
    for panel, row, gaps in zip(panels, rows, kept, strict=True):
        assert row.inter_token_ms is not None
        panel.hist(gaps, edges, color=COLOURS[0])
        panel.axvline(row.inter_token_ms.p50, color=COLOURS[1], linewidth=1)
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
        panel.set_title(
            f"{row.engine}, {row.dtype}, {test(row)}: median {row.inter_token_ms.p50:,.2f} ms, "
            f"p99 {row.inter_token_ms.p99:,.2f} ms",
            loc="left", fontsize=8,
        )  # fmt: skip
    panels[-1].set_xlabel("time between two tokens, ms (the line is the median)")


def _parts(drawing: Any, rows: Sequence[Row]) -> None:
    axes = drawing.subplots()
    names = list(dict.fromkeys(stage.name for row in rows for stage in row.parts))
    for number, row in enumerate(rows):
        left = 0.0
        for part in row.parts:
            axes.barh(
                number, part.time_us / 1e3, 0.6, left / 1e3, color=COLOURS[names.index(part.name) % len(COLOURS)],
                label=part.name if row is rows[0] else None,
            )  # fmt: skip
            left += part.time_us
        _beside(axes, left / 1e3, number, f"{left / 1e3:,.2f} ms")
    axes.set_yticks(range(len(rows)), [f"{row.dtype}, {test(row)}" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("time in one decode step, ms")
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, frameon=False, fontsize=8)


def _kernels(drawing: Any, rows: Sequence[Any]) -> None:
    axes = drawing.subplots()
    for number, row in enumerate(rows):
        axes.barh(number - 0.18, 100 * row.share_of_read_bandwidth, 0.34, color=COLOURS[0])
        if row.torch_us is not None:
            theirs = 100 * row.share_of_read_bandwidth * row.time_us.p50 / row.torch_us.p50
            axes.barh(number + 0.18, theirs, 0.34, color="#bbb")
    axes.axvline(100, color="#777", linestyle="--")
    axes.set_yticks(range(len(rows)), [f"{row.kernel}, {row.dtype}, {row.shape}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of the read bandwidth, % (blue: launcher, grey: PyTorch)")

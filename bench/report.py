"""Writes bench/RESULTS.md from the files under bench/results.

    python -m runtime.bench.report [--results DIR] [--out FILE]

Every figure comes from a file there, named beside its table; whatever no file contains is listed as never measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.bench.records import Report
from runtime.bench.table import aligned, machine, notes, tables
from runtime.model.published import PUBLISHED

HERE = Path(__file__).parent
PARTS = ("gates", "audits", "steps", "kernels", "host_loop", "guesses", "peers", "timeline")


@dataclass(frozen=True)
class Campaign:
    """The results of one run of runtime.bench.gpu: a folder with a file per part or, in the older format, one file."""

    source: str
    machine: dict[str, Any]
    parts: dict[str, list[dict[str, Any]]]


def campaigns(results: Path) -> Iterator[Campaign]:
    """All GPU campaigns under a folder, oldest name first."""
    for folder in sorted(path for path in results.iterdir() if (path / "machine.json").is_file()):
        parts = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        rows = {name: parts[name]["rows"] for name in PARTS if name in parts}
        yield Campaign(folder.name, parts["machine"]["machine"], rows)
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        if found.get("schema") == 1 and "ceilings" in found:
            renamed = {"speeds": "steps", "hugging_face": "peers"}
            rows = {renamed.get(name, name): rows for name, rows in found.items() if isinstance(rows, list)}
            yield Campaign(path.name, found["environment"] | found["ceilings"], rows)


def render(results: Path) -> str:
    """The report as Markdown."""
    found = list(campaigns(results))
    lines = [
        "# Results",
        "",
        "Written by `python -m runtime.bench.report` from the files in [`results/`](results).",
        "",
    ]
    for campaign in found:
        lines += _campaign(campaign)
    for path in sorted(results.glob("compare-*.json")):
        lines += _comparison(path)
    lines += ["## Never measured", "", *_missing(found), ""]
    return "\n".join(lines)


def _campaign(campaign: Campaign) -> list[str]:
    machine, parts = campaign.machine, campaign.parts
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "transformers") if machine.get(name))
    launch = f"{machine['empty_launch_us']:.2f} µs"
    if "empty_dependent_launch_us" in machine:
        launch += f", with dependent launch {machine['empty_dependent_launch_us']:.2f} µs"
    lines = [
        f"## {machine['gpu']}: `{campaign.source}`",
        "",
        f"{versions}; commit {machine.get('commit') or 'not recorded'}, {machine['time']}. Reading "
        f"{machine['read_gb_s']:,.0f} GB/s, copying {machine['copy_gb_s']:,.0f} GB/s; an empty kernel in a graph "
        f"{launch}.",
        "",
    ]
    if parts.get("gates"):
        passed = sum(row["passed"] for row in parts["gates"])
        lines += [f"Correctness gates passed: {passed} of {len(parts['gates'])}.", ""]
    for part, (title, line) in TABLES.items():
        if not parts.get(part):
            continue
        found = [line(row) for row in parts[part]]
        heading = list(dict.fromkeys(name for cells in found for name in cells))
        lines += [title, "", *aligned(heading, [[_cell(cells.get(name)) for name in heading] for cells in found]), ""]
    return lines


def _step(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": row["model"],
        "dtype": row["dtype"],
        "batch": row["batch"],
        "context": f"{row['context']:,}",
        "steps a graph": row["steps_per_graph"],
        "dependent launch": "yes" if row.get("dependent_launch", True) else "no",
        "µs a step (p10, p90)": f"{row['step_us']:,.1f} ({row['p10_us']:,.1f}, {row['p90_us']:,.1f})",
        "tokens/s": f"{row['tokens_per_s']:,.0f}",
        "of read bandwidth": f"{row['share_of_read_bandwidth']:.1%}",
    }


def _kernel(row: dict[str, Any]) -> dict[str, Any]:
    shape = f"{row['outputs']:,} x {row['width']:,}" if "width" in row else f"context {row.get('context', 0):,}"
    return {
        "model": row["model"],
        "kernel": row["kernel"],
        "shape": row.get("shape", shape),  # files of before have sizes
        "µs": row["time_us"],
        "GB/s": f"{row['bandwidth_gb_s']:,.0f}",
        "of read bandwidth": f"{row['share_of_read_bandwidth']:.1%}",
        "PyTorch, µs": row.get("torch_us", row.get("torch_linear_us")),
        "torch.compile, µs": row.get("torch_compiled_us"),
    }


# Part -> its title, and what a line shows of a row.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "steps": ("Captured decode steps, random weights of the published shapes:", _step),
    "peers": (
        "Hugging Face on the same weights:",
        lambda row: {"model": row["model"], "cache": row["cache"], "tokens/s": f"{row['tokens_per_s']:,.1f}"},
    ),
    "host_loop": ("Through the host's loop:", dict),
    "guesses": ("Steps that check guesses, waited for one by one:", dict),
    "kernels": ("Kernels:", _kernel),
}


def _comparison(path: Path) -> list[str]:
    report = Report.from_file(path)
    lines = [f"## {report.environment.device_name}: `{path.name}`", ""]
    lines += ["  \n".join(machine(report)), ""]
    for table in tables(report).values():
        lines += [*aligned(*table), ""]
    return lines + [f"- {note}" for note in notes(report)] + [""]


def _missing(found: list[Campaign]) -> list[str]:
    measured = {
        (part, Path(str(row["model"])).name)
        for campaign in found
        for part, rows in campaign.parts.items()
        for row in rows
    }
    lines = []
    for part in PARTS:
        absent = [name for name in PUBLISHED if (part, name) not in measured]
        if absent:
            lines.append(f"- {part}: {', '.join(absent)}")
    rows = [row for campaign in found for row in campaign.parts.get("steps", [])]
    if not any(row["model"] not in PUBLISHED for row in rows):
        lines.append("- real weights on a GPU")
    if not any(row.get("dependent_launch") is False for row in rows):
        lines.append("- steps without dependent launch")
    machines = ", ".join(dict.fromkeys(str(campaign.machine["gpu"]) for campaign in found)) or "none"
    return [*lines, f"- any GPU but: {machines}"]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the measurements are")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="the report")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"--results: no folder {args.results}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(render(args.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

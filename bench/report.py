"""Writes bench/RESULTS.md from the files under bench/results: every GPU campaign and comparison as tables.

python -m runtime.bench.report [--results DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.bench.records import Report
from runtime.bench.table import aligned, machine, notes, table_of, tables

HERE = Path(__file__).parent
TITLES = {
    "gates": "Correctness gates:",
    "audits": "Errors of decoding and of Hugging Face's, teacher-forced, against the same weights in fp32:",
    "steps": "Captured decode steps, random weights of the published shapes:",
    "quantized": "Captured decode steps, matrices in int8 and int4:",
    "peers": "Hugging Face on the same weights:",
    "host_loop": "Through the host's loop:",
    "guesses": "Steps that check guesses, waited for one by one:",
    "kernels": "Kernels:",
    "timeline": "Kernels of one step as the profiler sees them:",
}
OLDER = {"steps": "speeds", "peers": "hugging_face"}  # names of parts in the older format

Rows = list[dict[str, Any]]


def campaigns(results: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Rows]]]:
    """For each run of runtime.bench.gpu under a folder, oldest name first: its name, the machine, and its parts, from a
    folder with a file per part or, in the older format, from one file."""
    for folder in sorted(path.parent for path in results.glob("*/machine.json")):
        found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        parts = {part: found[part]["rows"] for part in TITLES if part in found}
        yield folder.name, found["machine"]["machine"], parts
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        if found.get("schema") == 1 and "ceilings" in found:
            parts = {part: found.get(part, found.get(OLDER.get(part, part), [])) for part in TITLES}
            yield path.name, found["environment"] | found["ceilings"], parts


def render(results: Path) -> str:
    """The report as Markdown."""
    lines = [
        "# Results",
        "",
        "Written by `python -m runtime.bench.report` from the files in [`results/`](results).",
        "",
    ]
    for source, where, parts in campaigns(results):
        versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "transformers") if where.get(name))
        launches = f"an empty kernel in a graph {where['empty_launch_us']:.2f} µs"
        if "empty_dependent_launch_us" in where:
            launches += f", with dependent launch {where['empty_dependent_launch_us']:.2f} µs"
        read, copied = (f"{where[name]:,.0f} GB/s" for name in ("read_gb_s", "copy_gb_s"))
        lines += [f"## {where['gpu']}: `{source}`", ""]
        lines += [f"{versions}; commit {where.get('commit') or 'not recorded'}, {where['time']}."]
        lines += [f"Reading {read}, copying {copied}; {launches}.", ""]
        for part, rows in parts.items():
            if rows:
                lines += [TITLES[part], "", *aligned(*table_of(dict(_cells(row)) for row in rows)), ""]
    for path in sorted(results.glob("compare-*.json")):
        report = Report.from_file(path)
        lines += [f"## {report.environment.device_name}: `{path.name}`", "", "  \n".join(machine(report)), ""]
        for table in tables(report).values():
            lines += [*aligned(*table), ""]
        lines += [*(f"- {note}" for note in notes(report)), ""]
    return "\n".join(lines)


def _cells(row: dict[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """Every single value of a row by its name, without raw samples."""
    for name, value in row.items():
        title = f"{within}{name}".replace("_", " ")
        if isinstance(value, dict):
            yield from _cells(value, f"{name} ")
        elif isinstance(value, bool):
            yield title, "yes" if value else "no"
        elif isinstance(value, float):
            yield (
                title,
                f"{value:.1%}" if name.startswith("share") else f"{value:,.4g}" if value < 1 else f"{value:,.1f}",
            )
        elif isinstance(value, int):
            yield title, f"{value:,}"
        elif value is not None and not isinstance(value, list):
            yield title, str(value)


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

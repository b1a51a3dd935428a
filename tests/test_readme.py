"""Every measured figure in the README and the documentation stands in a file under bench/results/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.parity.report import Report, base_rate

pytestmark = pytest.mark.newest_only

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLES = {"README.md", "benchmarking.md"}  # pages that have many figures
Figures = dict[str, set[float]]  # by unit, as a text would have them
FIGURE = re.compile(r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?) ?(tokens/s|GB/s|TB/s|µs|ms|%|times)(?!\w)")
# What a figure of a unit is called in the files, and how it was scaled on its way into the text.
NAMED = {
    "tokens/s": ("tokens_per_s", 1),
    "GB/s": ("gb_s", 1),
    "TB/s": ("gb_s", 1e-3),
    "µs": ("_us", 1),
    "ms": ("_ms", 1),
    "%": ("share", 100),
    "times": ("ratio", 1),  # and `ratios`
}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every single number of a file by its path; raw samples, which are lists of numbers, are none of them."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for inner in value:
            if not isinstance(inner, int | float):
                yield from leaves(inner, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def ratios(files: dict[str, Any]) -> Iterator[float]:
    """What the text says of two figures of one file: rows of a batch against one, our errors against Hugging Face's,
    bytes moved against bytes needed."""
    for content in files.values():
        steps: dict[tuple[Any, ...], dict[int, float]] = {}
        part = content.get("part")
        for row in content.get("speeds", content["rows"] if part == "steps" else ()):
            key = (
                row["model"],
                row["context"],
                row["steps_per_graph"],
                row.get("max_batch"),
                row.get("dependent_launch"),
            )
            same = steps.setdefault(key, {})
            same[row["batch"]] = row["step_us"]
        yield from (time / same[1] for same in steps.values() if 1 in same for time in same.values())
        for audit in content.get("audits", ()):
            for measure in ("median", "p99"):
                ours, theirs = (audit[side][f"margin_error_{measure}"] for side in ("ours", "hugging_face"))
                yield ours / theirs
        for audit in content["rows"] if part == "audits" else ():
            yield audit["ours"]["logits_error_rms"] / audit["hugging_face"]["logits_error_rms"]
        if "bytes_needed" in content:
            yield content["bytes_moved"] / content["bytes_needed"]


def figures_of(files: dict[str, Any]) -> Figures:
    """What every file has for each unit."""
    numbers = [leaf for content in files.values() for leaf in leaves(content)]
    found = {unit: {value * scale for path, value in numbers if name in path} for unit, (name, scale) in NAMED.items()}
    found["times"] |= set(ratios(files))
    return found


def found_in(figures: Figures, text: str, unit: str) -> bool:
    decimals = len(text.partition(".")[2])
    return any(f"{value:.{decimals}f}" == text.replace(",", "") for value in figures[unit])


@pytest.fixture(scope="module")
def measured() -> Figures:
    """The committed ones."""
    return figures_of({str(file): json.loads(file.read_text()) for file in RESULTS.rglob("*.json")})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_has_a_file_behind_it(page, measured):
    figures = FIGURE.findall(page.read_text())
    assert len(figures) > 20 or page.name not in TABLES
    missing = [f"{text} {unit}" for text, unit in figures if not found_in(measured, text, unit)]
    assert not missing


def test_a_figure_without_a_file_is_noticed(measured):
    for unit in ("tokens/s", "µs"):
        assert found_in(measured, f"{max(measured[unit]):.1f}", unit)
        assert not found_in(measured, f"{max(measured[unit]) + 1:.1f}", unit)
    assert not found_in(figures_of({"a": {"tokens_per_s": [7.0]}}), "7", "tokens/s"), "a raw sample is no result"
    assert found_in(figures_of({"a": {"tokens_per_s": {"p50": 7.04}}}), "7.0", "tokens/s")


def test_the_base_rate_is_that_of_the_reports():
    page = (ROOT / "docs" / "numerics.md").read_text()
    in_fp32, in_bf16 = (
        Report.model_validate_json((RESULTS / f"verify-demo-{dtype}.json").read_text())
        for dtype in ("float32", "bfloat16")
    )
    assert in_fp32.passed and len(in_fp32.prompts) == 40 and all(record.exact for record in in_fp32.prompts)
    assert in_bf16.passed and base_rate(in_bf16)
    for name, count, of, gap in base_rate(in_bf16):
        assert f"| {name} | {count} of {of} | {gap:.3g} |" in page
    *others, ours = [of - count for _, count, of, _ in base_rate(in_bf16)]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{ours} in bf16, where Hugging Face with another cache, attention or batch repeats" in readme
    assert f"repeats {min(others)} to {max(others)} of its own" in readme


@pytest.mark.parametrize("numbers", ["CPU", "GPU"])
def test_the_readmes_tables_are_those_of_the_benchmarking_page(numbers):
    """Row by row: what the README shows of an engine or a shape stands in the same row of the full table."""

    def rows(page: Path) -> dict[str, set[str]]:
        text = page.read_text()
        section = text.split(f"<!-- {numbers} numbers: begin -->")[1].split(f"<!-- {numbers} numbers: end -->")[0]
        cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in re.findall(r"\|.+\|\n", section)]
        named: dict[str, set[str]] = {}
        for name, *values in cells:
            named.setdefault(name.removeprefix("first token: "), set()).update(values)
        return {name: values for name, values in named.items() if any(FIGURE.search(value) for value in values)}

    short, full = rows(ROOT / "README.md"), rows(ROOT / "docs" / "benchmarking.md")
    full |= {"OpenVINO GenAI 2026.4": full.get("OpenVINO GenAI 2026.4", set()) | full.get("OpenVINO", set())}
    full |= {name: values | full["llama.cpp"] for name, values in full.items() if name.startswith("llama.cpp (")}
    assert len(short) == 4
    assert {name: values - full[name] for name, values in short.items() if values - full[name]} == {}

"""The report on disk and on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.errors import OutputError
from runtime.parity.records import PromptRecord, Report
from runtime.text.tokenizer import Tokenizer

MARKS = {True: "ok", False: "REFUSED", None: "-"}


def write_json(report: Report, path: Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the report as JSON: the whole file or nothing.

    Raises:
        OSError: it cannot be written.
    """
    _write(path, json.dumps(report.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n")


def write_html(report: Report, path: Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the report as one page that needs nothing else; `tokenizer` turns ids into text.

    Raises:
        OSError: it cannot be written.
    """
    from runtime.parity.html import page

    _write(path, page(report, tokenizer))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write the report {path}: {error.strerror or error}") from error


def text_table(report: Report) -> str:
    """The report for a terminal."""
    e = report.environment
    lines = [
        f"{e['model']} (sha256 {e['checkpoint_sha256'][:12]}), {e['dtype']}, {e['device_name']}",
        f"transformers {e['transformers']}, {e['attention']} attention, {e['cache']}; torch {e['torch']}, "
        f"Triton {e['triton']}",
        "",
    ]
    rows = [(MARKS[found.passed], found.part, f"{found.measured} (bound: {found.bound})") for found in report.findings]
    rows += [(MARKS[check.passed], check.name, check.detail) for check in report.checks]
    rows += [(MARKS[fault.refused], f"planted: {fault.name}", fault.detail) for fault in report.faults]
    width = max(len(name) for _, name, _ in rows)
    lines += [f"{mark:<8} {name:<{width}}  {told}" for mark, name, told in rows]
    parted = [line for record in report.prompts for line in _divergences(record)]
    if parted:
        lines += ["", "where tokens differ (step, ours / Hugging Face's, fp64 gap, who is nearer to fp64):", *parted]
    rates = base_rate(report)
    if rates:
        lines += ["", f"Hugging Face against itself ({e['cache']}, {e['attention']} attention, one by one):"]
        lines += [
            f"  {name:<16} {count} of {of} prompts differ, largest fp64 gap {gap:.3g}" for name, count, of, gap in rates
        ]
    return "\n".join([*lines, "", nearer(report.prompts), report.verdict])


def nearer(records: Sequence[PromptRecord]) -> str:
    """Who is nearer to the truth, in a sentence."""
    ours, theirs = (
        np.median(np.concatenate([getattr(record, side) for record in records]))
        for side in ("our_logit_errors", "their_logit_errors")
    )
    chosen = [divergence.nearer for record in records for divergence in record.divergences]
    told = f"largest logit error of a step against fp64, median: ours {ours:.3g}, Hugging Face's {theirs:.3g}"
    if chosen:
        told += f"; of {len(chosen)} different choices, fp64 sides with ours in {chosen.count('ours')}"
    return told


def base_rate(report: Report) -> list[tuple[str, int, int, float]]:
    """For each other way to run Hugging Face, if any was tried, and last for this runtime: its name, diverging prompts,
    of how many, the largest fp64 gap at a first divergence."""
    found = {
        name: [(run.parts_at is not None, run.gap) for run in (record.variants[name] for record in report.prompts)]
        for name in report.prompts[0].variants
    }
    if found:
        found["this runtime"] = [
            (not record.exact, next((d.gap for d in record.divergences if d.first), 0.0)) for record in report.prompts
        ]
    return [
        (name, sum(parted for parted, _ in runs), len(runs), max(gap for _, gap in runs))
        for name, runs in found.items()
    ]


def _divergences(record: PromptRecord) -> list[str]:
    return [
        f"  {record.name}, {d.step}{'' if d.first else ' (later)'}: {d.ours} / {d.theirs}, gap {d.gap:.3g}, {d.nearer}"
        for d in record.divergences
    ]

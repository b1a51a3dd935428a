"""The report of an audit: its JSON schema, its text for a terminal, and its verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from runtime.parity.records import Check, Fault, Finding, PromptRecord, Record
from runtime.text.tokenizer import Tokenizer

SCHEMA: Literal["gemma-runtime.verify"] = "gemma-runtime.verify"
SCHEMA_VERSION: Literal[1] = 1
MARKS = {True: "ok", False: "REFUSED", None: "-"}


class Report(Record):
    """The outcome of an audit. Printed, it is a table for a terminal; `to_json()` is what `--json` writes."""

    schema_name: Literal["gemma-runtime.verify"] = SCHEMA
    schema_version: Literal[1] = SCHEMA_VERSION
    passed: bool
    verdict: str
    environment: dict[str, Any]
    findings: list[Finding]
    checks: list[Check]
    faults: list[Fault]
    prompts: list[PromptRecord] = Field(min_length=1)
    time: str | None = None  # UTC, ISO 8601, when the audit began
    texts: dict[int, str] = Field(default_factory=dict)  # `Tokenizer.piece` of each token; empty without a tokenizer

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> Report:
        """Reads a report that `to_json` wrote.

        Raises:
            ValueError: the file is not a report of this version; the message names the first error.
            OSError: it cannot be read.
        """
        try:
            report = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            expected = f"expected a report of `verify`, schema version {SCHEMA_VERSION}"
            raise ValueError(f"{path}: {expected}: {where}: {first['msg']}") from None
        missing = [name for name in ("model", "dtype", "device", "device_name") if name not in report.environment]
        if missing:
            raise ValueError(f"{path}: expected an environment with {missing[0]}, got {', '.join(report.environment)}")
        return report

    @property
    def weights(self) -> str:
        """The format of the weights: "bfloat16", or "int8, float32" for a quantised model."""
        return ", ".join(filter(None, (self.environment.get("quantize"), self.environment["dtype"])))

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def __str__(self) -> str:
        e = self.environment
        lines = [
            f"{e['model']} (sha256 {e['checkpoint_sha256'][:12]}), {self.weights}, {e['device_name']}",
            f"transformers {e['transformers']}, {e['attention']} attention, {e['cache']}; torch {e['torch']}, "
            f"Triton {e['triton']}",
            "",
        ]
        rows = [
            (MARKS[finding.passed], finding.part, f"{finding.measured} (bound: {finding.bound})")
            for finding in self.findings
        ]
        rows += [(MARKS[check.passed], check.name, check.detail) for check in self.checks]
        rows += [(MARKS[fault.refused], f"planted: {fault.name}", fault.detail) for fault in self.faults]
        width = max(len(name) for _, name, _ in rows)
        lines += [f"{mark:<8} {name:<{width}}  {detail}" for mark, name, detail in rows]
        differing = [line for record in self.prompts for line in _divergences(record)]
        if differing:
            lines += ["", "where tokens differ (step, ours / Hugging Face's, fp64 gap, who is nearer to fp64):"]
            lines += differing
        rates = base_rate(self)
        if rates:
            lines += ["", f"Hugging Face against itself ({e['cache']}, {e['attention']} attention, batch of 1):"]
            lines += [
                f"  {name:<16} {count} of {total} prompts differ, largest fp64 gap {gap:.3g}"
                for name, count, total, gap in rates
            ]
        return "\n".join([*lines, "", nearer(self.prompts), self.verdict])


def token_texts(records: Sequence[PromptRecord], tokenizer: Tokenizer | None) -> dict[int, str]:
    """The text of each token in some records, by its id in ascending order."""
    if tokenizer is None:
        return {}
    ids = {token for record in records for token in (*record.prompt_ids, *record.ours, *record.theirs, *record.forced)}
    return {token: tokenizer.piece(token) for token in sorted(ids)}


def verdict(
    passed: bool,
    records: Sequence[PromptRecord],
    findings: Sequence[Finding],
    checks: Sequence[Check] = (),
    faults: Sequence[Fault] = (),
) -> str:
    """The verdict in one line."""
    divergences = sum(len(record.divergences) for record in records)
    line = equal_prompts(records)
    if passed:
        return f"passed: {line}" + (f", {divergences} differences explained" if divergences else "")
    broken = [
        f"{finding.part}: {finding.measured} (bound: {finding.bound})"
        for finding in findings
        if finding.passed is False
    ]
    broken += [f"{check.name}: {check.detail}" for check in checks if check.passed is False]
    broken += [f"the fault {fault.name!r} was not noticed" for fault in faults if not fault.refused]
    return f"refused: {line}; " + "; ".join(broken)


def equal_prompts(records: Sequence[PromptRecord]) -> str:
    """How many prompts have Hugging Face's tokens, in words."""
    exact = sum(record.exact for record in records)
    return f"{exact} of {len(records)} prompts equal Hugging Face's {len(records[0].ours)} tokens"


def nearer(records: Sequence[PromptRecord]) -> str:
    """A sentence on which side is nearer to fp64."""
    ours, theirs = (
        np.median(np.concatenate([getattr(record, side) for record in records]))
        for side in ("our_logit_errors", "their_logit_errors")
    )
    chosen = [divergence.nearer for record in records for divergence in record.divergences]
    sentence = f"largest logit error of a step against fp64, median: ours {ours:.3g}, Hugging Face's {theirs:.3g}"
    if chosen:
        sentence += f"; of {len(chosen)} different choices, fp64 agrees with ours in {chosen.count('ours')}"
    return sentence


def base_rate(report: Report) -> list[tuple[str, int, int, float]]:
    """Hugging Face against itself: (name, diverging prompts, all prompts, largest fp64 gap at a first divergence) for
    each other way to run it, and last for this runtime; empty where no other way was tried."""
    rates = {
        name: [(each.parts_at is not None, each.gap) for each in (record.variants[name] for record in report.prompts)]
        for name in report.prompts[0].variants
    }
    if rates:
        rates["this runtime"] = [
            (not record.exact, next((d.gap for d in record.divergences if d.first), 0.0)) for record in report.prompts
        ]
    return [
        (name, sum(differs for differs, _ in prompts), len(prompts), max(gap for _, gap in prompts))
        for name, prompts in rates.items()
    ]


def _divergences(record: PromptRecord) -> list[str]:
    return [
        f"  {record.name}, {d.step}{'' if d.first else ' (later)'}: {d.ours} / {d.theirs}, gap {d.gap:.3g}, {d.nearer}"
        for d in record.divergences
    ]

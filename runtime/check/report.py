"""What came of all checks of kernels: as a table, as data, as JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any
from xml.etree import ElementTree

import torch

from runtime.check.backends import Backend
from runtime.check.outcome import ERROR, FAILED, PASSED, SKIPPED, Outcome
from runtime.cost.info import cpu_name, installed_versions
from runtime.kernels.block import table_hash
from runtime.kernels.launch import gpu_of

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
HEADINGS = ("operation", "dtype", "device", "cases", "worst error / bound", "verdict")


def environment(backend: Backend) -> dict[str, Any]:
    """What the outcomes depend on: versions, device, the table of block shapes."""
    gpu = gpu_of(torch.device(backend.device))
    return {
        "device": backend.device,
        "device_name": gpu.name if gpu else cpu_name(),
        "kernels": backend.kind,
        "block_table_sha256": table_hash(gpu) if backend.is_triton else None,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        **installed_versions(),
    }


@dataclass(frozen=True)
class KernelReport:
    """The outcomes of all checks on one backend; `print` it, or take `to_dict()` for JSON, `to_junit()` for CI.

    Attributes:
        kind: of the backend, "cuda", "interpret" or "cpu".
        environment: as `environment` gives it.
        outcomes: in the order in which the checks ran.
        seconds: that all of them took.
        time: when it began, in UTC.
    """

    kind: str
    environment: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    seconds: float
    time: str

    def count(self, *statuses: str) -> int:
        return sum(outcome.status in statuses for outcome in self.outcomes)

    @property
    def ran(self) -> bool:
        """Whether anything was checked."""
        return self.count(PASSED, FAILED, ERROR) > 0

    @property
    def passed(self) -> bool:
        """Whether something was checked and nothing of it is wrong."""
        return self.ran and not self.count(FAILED, ERROR)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        counts = {status: self.count(status) for status in (PASSED, FAILED, ERROR, SKIPPED)}
        return {
            "command": "check kernels",
            "time": self.time,
            "verdict": self.passed,
            "seconds": self.seconds,
            **counts,
            "environment": self.environment,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }

    def to_junit(self) -> str:
        """A JUnit XML document of one suite; a test case's class is its operation on this backend."""
        counts = {
            "tests": len(self.outcomes),
            "failures": self.count(FAILED),
            "errors": self.count(ERROR),
            "skipped": self.count(SKIPPED),
        }
        totals = {name: str(count) for name, count in counts.items()} | {"time": f"{self.seconds:.3f}"}
        root = ElementTree.Element("testsuites", totals)
        stamp = self.time.removesuffix("Z")
        suite = ElementTree.SubElement(root, "testsuite", {"name": "kernels", "timestamp": stamp} | totals)
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in self.environment.items():
            if value is not None:
                ElementTree.SubElement(properties, "property", {"name": name, "value": _xml(str(value))})
        for outcome in self.outcomes:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                {
                    "classname": f"{self.kind}.{outcome.operation}",
                    "name": f"{outcome.name}, {outcome.dtype}",
                    "time": f"{outcome.seconds:.3f}",
                },
            )
            tag = {FAILED: "failure", ERROR: "error", SKIPPED: "skipped"}.get(outcome.status)
            if tag is not None:
                element = ElementTree.SubElement(case, tag, {"message": _xml(outcome.message)})
                element.text = _xml(outcome.details) or None
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"

    def __str__(self) -> str:
        rows = [HEADINGS, *map(self._row, self._groups())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        bad = [outcome for outcome in self.outcomes if outcome.is_bad]
        lines += ["", *(f"{outcome.status}: {describe(outcome)}: {outcome.message}" for outcome in bad)] if bad else []
        skipped = sorted({outcome.message for outcome in self.outcomes if outcome.status == SKIPPED})
        lines += ["", *(f"skipped: {message}" for message in skipped)] if skipped else []
        labels = {PASSED: "passed", FAILED: "failed", ERROR: "errors", SKIPPED: "skipped"}
        counts = [f"{self.count(status)} {label}" for status, label in labels.items()]
        return "\n".join([*lines, "", f"{', '.join(counts)} in {self.seconds:.0f} s"])

    def _groups(self) -> Iterable[list[Outcome]]:
        """The outcomes by operation and dtype."""
        groups: dict[tuple[str, str], list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault((outcome.operation, outcome.dtype), []).append(outcome)
        return groups.values()

    def _row(self, group: list[Outcome]) -> tuple[str, ...]:
        bad, ran = sum(outcome.is_bad for outcome in group), [one for one in group if one.status != SKIPPED]
        shares = [outcome.share for outcome in group if outcome.share is not None]
        worst = f"{max(shares):.2f}" if shares and not bad else "-"
        verdict = "skipped" if not ran else f"{bad} wrong" if bad else "passed"
        return group[0].operation, group[0].dtype, self.kind, str(len(group)), worst, verdict


def describe(outcome: Outcome) -> str:
    """Which check an outcome is of."""
    return f"{outcome.operation} {outcome.name}, {outcome.dtype}"


def _xml(text: str) -> str:
    """Text without the characters that XML has no way to write."""
    return _NOT_IN_XML.sub("\ufffd", text)

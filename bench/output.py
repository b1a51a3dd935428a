"""The output of a report: to stdout in one of four forms, to a JSON file, to an HTML page."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from runtime.bench.records import AnyRow, Report
from runtime.bench.table import as_csv, markdown

FORMATS: dict[str, Callable[[Report], str]] = {
    "md": markdown,
    "json": Report.to_json,
    "jsonl": Report.to_jsonl,
    "csv": as_csv,
}
KEPT = (".json", ".jsonl")


class Output:
    """Collects rows and prints the report at the end; JSON Lines are printed as rows arrive.

    Args:
        report: the run, without rows.
        form: one of FORMATS.
        wide: whether a table has every column.
        out: file for the report as JSON (JSON Lines if its name ends in .jsonl), or None.
        html: file for the page, or None.

    Raises:
        ValueError: the report's name has another suffix, or is the page's too.
        OSError: a file cannot be written. All of this is checked before anything is measured.
    """

    def __init__(self, report: Report, form: str, out: Path | None, html: Path | None, wide: bool = False) -> None:
        self.report = report
        self._rows: list[AnyRow] = []
        self._form, self._out, self._html, self._wide = form, out, html, wide
        if out is not None and out.suffix not in KEPT:
            raise ValueError(f"--json: expected a name that ends in {' or '.join(KEPT)}, got {out}")
        if out is not None and html is not None and out.absolute() == html.absolute():
            raise ValueError(f"--json and --html: expected two files, got {out} for both")
        for path in (out, html):
            if path is not None:
                check_writable(path)

    def add(self, row: AnyRow) -> None:
        """Adds a row, which is kept even if the run is interrupted later."""
        self._rows.append(row)
        if self._form == "jsonl":
            print(self.report.with_rows([row]).to_jsonl(), end="", flush=True)
        if self._out is not None:
            self._out.write_text(self._kept(self._out))

    def close(self) -> None:
        """Prints the report and writes the page, if there are any rows."""
        if not self._rows:
            return
        report = self.report = self.report.with_rows(self._rows)
        if self._form != "jsonl":
            text = markdown(report, wide=self._wide) if self._form == "md" else FORMATS[self._form](report)
            print(text, end="", flush=True)
        if self._html is not None:
            from runtime.bench.html import page

            self._html.write_text(page(report), encoding="utf-8")

    def _kept(self, path: Path) -> str:
        report = self.report.with_rows(self._rows)
        return report.to_jsonl() if path.suffix == ".jsonl" else report.to_json()


def check_writable(path: Path) -> None:
    """Refuses a file that cannot be written.

    Raises:
        OSError: it is a folder, or its folder is missing or not writable; the message names it.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission")

"""The report as one self-contained HTML page: the verdict, its groups of checks, and the texts where they differ.

`python -m runtime.parity.html REPORT.json` makes it from a finished audit's `--json`.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.page.charts import Axis, Bin, Histogram, bins
from runtime.page.frame import WHITESPACE, render, shortened
from runtime.parity.criterion import gap_bound, is_explained, largest_gap
from runtime.parity.groups import groups
from runtime.parity.output_file import check_writable, write
from runtime.parity.records import Divergence, PromptRecord
from runtime.parity.report import Report, base_rate, equal_prompts, nearer

TEMPLATE = Path(__file__).with_name("report.html")
LOWEST, HIGHEST, BINS_PER_DECADE = -5, 2, 5  # decades of the histogram's margins
BEFORE, AFTER = 12, 10  # tokens shown around a difference
BYTES = re.compile(r"(?:<0x[0-9A-Fa-f]{2}>)+")


class Difference(NamedTuple):
    """A step at which the two sides pick different tokens after the same text; `divergence` is None where only the free
    run differs. `explained` is None where no gap explains a difference."""

    step: int
    before: str
    ours: str
    theirs: str
    ours_after: str
    theirs_after: str
    divergence: Divergence | None
    explained: bool | None
    bound: str


class ShownPrompt(NamedTuple):
    """A prompt as shown: `name` is its shortened text."""

    name: str
    record: PromptRecord
    text: str
    ours: str
    theirs: str
    differences: list[Difference]

    @property
    def is_unexplained(self) -> bool:
        return any(difference.explained is False for difference in self.differences)


def page(report: Report) -> str:
    """The page; tokens without a text in the report are shown as ids."""
    environment = report.environment
    shown = [_prompt(report, record) for record in report.prompts]
    differing = sorted((prompt for prompt in shown if prompt.differences), key=lambda prompt: not prompt.is_unexplained)
    suites: dict[str, list[ShownPrompt]] = {}
    for prompt in shown:
        if not prompt.differences:
            suites.setdefault(prompt.record.suite, []).append(prompt)
    verdict = report.verdict if report.passed else f"refused: {equal_prompts(report.prompts)}"
    verdict = verdict[:1].upper() + verdict[1:]
    return render(
        TEMPLATE,
        title=f"Parity audit of {environment['model']}, {report.weights}: {verdict}",
        eyebrow="gemma-runtime verify: a parity audit against Hugging Face",
        verdict=verdict,
        is_good=report.passed,
        holds_for=[
            environment["model"],
            report.weights,
            *([report.time.replace("T", " ").replace("Z", " UTC")] if report.time else []),
            f"{environment['device_name']} ({environment['device']})",
        ],
        groups=groups(report),
        differing=differing,
        divergences=sum(len(prompt.differences) for prompt in differing),
        equal=suites,
        nearer=nearer(report.prompts),
        rates=base_rate(report),
        margins=_margins(report.prompts),
        environment={name: value for name, value in environment.items() if value is not None},
    )


def _prompt(report: Report, record: PromptRecord) -> ShownPrompt:
    text = _text(report, record.prompt_ids)
    return ShownPrompt(
        name=shortened(text.removeprefix("<bos>")),
        record=record,
        text=text,
        ours=_text(report, record.ours),
        theirs=_text(report, record.theirs),
        differences=_differences(report, record),
    )


def _differences(report: Report, record: PromptRecord) -> list[Difference]:
    """A prompt's differences, in order of step."""
    divergences = {divergence.step: divergence for divergence in record.divergences}
    steps = divergences.keys() | ({record.parts_at} if record.parts_at is not None else set())
    return [_difference(report, record, step, divergences.get(step)) for step in sorted(steps)]


def _difference(report: Report, record: PromptRecord, step: int, divergence: Divergence | None) -> Difference:
    before = [*record.prompt_ids, *record.theirs[:step]]
    is_free = step == record.parts_at  # up to here the free run has read the same text
    ours = record.ours[step] if divergence is None else divergence.ours
    explained, bound = None, ""
    if divergence is not None and not any(finding.part == "equal tokens" for finding in report.findings):
        dtype = report.environment["dtype"]
        most, name = gap_bound(report.prompts, dtype, first=divergence.first)
        explained, bound = is_explained(divergence, most, dtype), f"{most:.3g}, {name}"
        if explained and divergence.gap > most:
            bound += ", unless fp64 prefers ours"
    return Difference(
        step=step,
        before=("… " if len(before) > BEFORE else "") + _line(report, before[-BEFORE:]),
        ours=_token(report, ours),
        theirs=_token(report, record.theirs[step]),
        ours_after=_line(report, record.ours[step + 1 : step + 1 + AFTER]) if is_free else "",
        theirs_after=_line(report, record.theirs[step + 1 : step + 1 + AFTER]),
        divergence=divergence,
        explained=explained,
        bound=bound,
    )


def _text(report: Report, ids: Sequence[int]) -> str:
    """The text of some tokens; runs of byte tokens are decoded as UTF-8."""
    text = "".join(report.texts.get(token, f"[{token}]") for token in ids)
    return BYTES.sub(lambda found: _decoded(found.group()), text)


def _line(report: Report, ids: Sequence[int]) -> str:
    """The same text on one line."""
    return _text(report, ids).translate(WHITESPACE)


def _decoded(pieces: str) -> str:
    return bytes.fromhex(pieces.replace("<0x", "").replace(">", "")).decode(errors="replace")


def _token(report: Report, token: int) -> str:
    """One token's text, its white space made visible."""
    return report.texts.get(token, f"[{token}]").translate(WHITESPACE).replace(" ", "␣")


def _margins(records: Sequence[PromptRecord]) -> Histogram:
    """The histogram of fp64 margins over all steps, and in each bin how many steps diverge."""
    margins = [margin for record in records for margin in record.margins]
    diverging = [record.margins[divergence.step] for record in records for divergence in record.divergences]
    count = (HIGHEST - LOWEST) * BINS_PER_DECADE
    all_steps, marked = (
        bins([_decade(margin) for margin in which], LOWEST, HIGHEST, count) for which in (margins, diverging)
    )
    ends = [10 ** (LOWEST + number / BINS_PER_DECADE) for number in range(count + 1)]
    bound = largest_gap(records)
    return Histogram(
        text=f"Histogram of {len(margins):,} steps by the fp64 margin between the two best tokens, in logits; "
        f"{len(diverging):,} differ. Line at {bound:.3g}, twice Hugging Face's largest error",
        x=Axis.powers("margin between the two best tokens in fp64, logits (logarithmic)", 10, (ends[0], ends[-1])),
        y=Axis.linear("steps", all_steps),
        bins=tuple(
            Bin(low, high, steps, f"margin {low:.2g} to {high:.2g}: {steps} steps, {differ} differ", differ)
            for low, high, steps, differ in zip(ends, ends[1:], all_steps, marked, strict=False)
        ),
        line=bound,
    )


def _decade(margin: float) -> float:
    return min(max(math.log10(margin), LOWEST), HIGHEST) if margin > 0 else LOWEST


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page of a report that `verify` has written as JSON.

    Args:
        arguments: the command line after `python -m runtime.parity.html`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m runtime.parity.html", description="A finished audit as a page.")
    parser.add_argument("report", type=Path, metavar="REPORT", help="a report written by `verify --json`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to (stdout)")
    options = parser.parse_args(arguments)
    try:
        if options.out is not None:
            check_writable(options.out)
        text = page(Report.from_file(options.report))
        if options.out is None:
            print(text)
        else:
            write(options.out, text)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

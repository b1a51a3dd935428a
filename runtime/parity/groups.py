"""The outcomes of an audit in four groups, each with the question that it answers, in words for newcomers."""

from __future__ import annotations

import re
from typing import NamedTuple

from runtime.parity.report import Report

# What each part of the criterion asks; the keys are the names that `judge` and `same_weights` give the parts.
TOKENS = {
    "greedy choice": "Each token is the one with the largest logit; of equals, the one with the lowest id.",
    "free and forced runs": "As long as both read the same text, the run on its own text and the run along Hugging "
    "Face's pick the same tokens.",
    "fp32 tokens": "Every token is Hugging Face's, or nearly ties with it in fp64.",
    "equal tokens": "Both sides run the same operations in the same order here, so every token must be equal.",
    "first divergences": "Where an answer first leaves Hugging Face's, the two tokens nearly tie in fp64.",
    "later divergences": "Put back onto Hugging Face's text, other choices after the first nearly tie too.",
    "diverging prompts": "No more prompts diverge than when Hugging Face is run against itself.",
}
ERRORS = {
    "weights": "Both sides read the same weights from the checkpoint, bit for bit.",
    "one model on both sides": "Hugging Face is as near to fp64 as this runtime is: both run the same model.",
    "logit error": "How far the score of any token is off, as a multiple of Hugging Face's error.",
    "margin error, median": "How far the best token's lead over the second is off: at a typical step,",
    "margin error, p99": "at the worst step in a hundred,",
    "margin error, max": "and at the worst of all.",
}
INVARIANCES = {
    r"batch of \d+": "Beside others in a batch, a prompt gets the tokens that it gets alone.",
    "captured and eager": "Steps replayed from a CUDA graph give the tokens of plain ones.",
    "another max_seq_len": "Room for longer texts changes no token.",
    r"prefill in chunks of \d+": "Reading the prompt in other pieces changes no token.",
    "after a stream closed early": "An answer that was broken off leaves nothing behind for the next one.",
    r"\d+ repetitions": "Asked again and again, a prompt gets one answer.",
    "fresh process": "Another process gives the same tokens.",
    "drawn, among greedy rows": "Tokens drawn by chance follow from prompt, temperature and seed alone: beside greedy "
    "answers, which stay what they are,",
    "drawn, in another order of arrival": "whichever request comes first,",
    "drawn, with guesses": "with several tokens guessed and checked at once,",
    "drawn, captured and eager": "and with steps replayed from a CUDA graph or not.",
}
IN_FP32 = "in fp32: "  # what a 16-bit audit runs again in fp32, where rounding hides nothing


class Outcome(NamedTuple):
    """One check: `passed` is None where it does not apply."""

    name: str
    meaning: str
    passed: bool | None
    measured: str
    bound: str


class Group(NamedTuple):
    """Some checks and the question that they answer."""

    name: str
    question: str
    outcomes: list[Outcome]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [outcome.name for outcome in self.outcomes if outcome.passed is False]

    @property
    def score(self) -> str:
        """How many checks passed, in words."""
        answers = [outcome.passed for outcome in self.outcomes]
        asked = len(answers) - answers.count(None)
        skipped = f", {answers.count(None)} not applicable" if None in answers else ""
        return f"{answers.count(True)} of {asked} passed{skipped}"


def groups(report: Report) -> list[Group]:
    """The groups that have checks, those with a failed check first, and within a group the failed checks first."""
    tokens: list[Outcome] = []
    errors: list[Outcome] = []
    for finding in report.findings:
        part = finding.part.removeprefix(IN_FP32)
        meaning = (TOKENS | ERRORS).get(part, "")
        outcome = Outcome(finding.part, meaning, finding.passed, finding.measured, finding.bound)
        (tokens if part in TOKENS else errors).append(outcome)
    checks = [
        Outcome(check.name, _meaning(check.name), check.passed, check.detail, "the same tokens")
        for check in report.checks
    ]
    faults = [
        Outcome(
            fault.name, "", fault.refused, f"refused by {fault.detail}" if fault.refused else "not noticed", "refused"
        )
        for fault in report.faults
    ]
    found = [
        Group("Tokens", "Does this runtime write the tokens that Hugging Face’s transformers writes?", tokens),
        Group("Errors", "Are its rounding errors, measured against fp64, as small as Hugging Face’s?", errors),
        Group("Invariances", "Does an answer stay the same whatever runs beside it, before it and around it?", checks),
        Group("Controls", "Would this audit notice a mistake? It plants some, and must refuse each.", faults),
    ]
    ordered = [group._replace(outcomes=sorted(group.outcomes, key=_failed_first)) for group in found if group.outcomes]
    return sorted(ordered, key=lambda group: group.passed)


def _failed_first(outcome: Outcome) -> bool:
    return outcome.passed is not False


def _meaning(check: str) -> str:
    return next((meaning for name, meaning in INVARIANCES.items() if re.fullmatch(name, check)), "")

"""What the audit finds, in the schema of its JSON report."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

SCHEMA = "gemma-runtime.verify"
SCHEMA_VERSION = 1


class Record(BaseModel):
    """Fields and nothing else; a value that is not finite is written as a string, since JSON has no number for it."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Divergence(Record):
    """A step at which our token is not Hugging Face's, after the same text: Hugging Face's up to there.

    `our_pair`, `their_pair` and `true_pair` are the logits of (our token, its token) on our side, on its side, and in
    fp64; `gap` is the distance between the two in fp64.
    """

    step: int
    ours: int
    theirs: int
    first: bool
    our_pair: tuple[float, float]
    their_pair: tuple[float, float]
    true_pair: tuple[float, float]
    gap: float

    @property
    def nearer(self) -> str:
        """Whose choice has the larger logit in fp64."""
        ours, theirs = self.true_pair
        return "ours" if ours > theirs else "Hugging Face's"


class Variant(Record):
    """Hugging Face run another way on the same prompt, against its own first run."""

    tokens: list[int]
    parts_at: int | None  # the first step that differs
    gap: float  # fp64 distance of the two tokens there, 0 where nothing differs


class PromptRecord(Record):
    """One prompt: both sides' tokens, and for each step how far each side is from fp64.

    `margins` are fp64's two best logits apart; the errors are each side's error on that difference, and the logit
    errors the largest error of any logit of the step.
    """

    name: str
    suite: str
    prompt_ids: list[int]
    ours: list[int]  # free-running
    theirs: list[int]
    forced: list[int]  # our choice at each step after Hugging Face's own tokens
    not_the_largest: list[int]  # steps where our token is not the first of our own largest logits
    margins: list[float]
    our_errors: list[float]
    their_errors: list[float]
    our_logit_errors: list[float]
    their_logit_errors: list[float]
    divergences: list[Divergence]
    variants: dict[str, Variant] = {}

    @property
    def exact(self) -> bool:
        return self.ours == self.theirs

    @property
    def parts_at(self) -> int | None:
        """The first step at which the free runs differ."""
        return first_difference(self.ours, self.theirs)


class Finding(Record):
    """One question of the criterion and its answer; `passed` is None where it could not be asked."""

    part: str
    passed: bool | None
    measured: str
    bound: str


class Check(Record):
    """Runs that must give one set of tokens; `passed` is None where they were not made, and `detail` says why."""

    name: str
    passed: bool | None
    detail: str


class Fault(Record):
    """A fault that the audit planted itself, and whether its criterion refused it."""

    name: str
    refused: bool
    detail: str


class Report(Record):
    """Everything, as `--json` writes it."""

    schema_name: str = SCHEMA
    schema_version: int = SCHEMA_VERSION
    passed: bool
    verdict: str
    environment: dict[str, Any]
    findings: list[Finding]
    checks: list[Check]
    faults: list[Fault]
    prompts: list[PromptRecord]

    def __str__(self) -> str:
        from runtime.parity.report import text_table

        return text_table(self)


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Where two runs part; None where they do not."""
    differing = (step for step, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return next(differing, None)

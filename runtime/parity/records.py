"""What an audit records: prompts, findings, checks and faults, the building blocks of the report."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Plain fields. JSON has no number for infinities and NaN, so they are written as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Divergence(Record):
    """A step at which our token is not Hugging Face's, both after Hugging Face's own text.

    `our_pair`, `their_pair` and `true_pair` are the logits of (our token, Hugging Face's token) in this runtime, in
    Hugging Face, and in fp64; `gap` is the distance between the two in fp64.
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
    """Hugging Face run in another way on the same prompt, compared with its own first run."""

    tokens: list[int]
    parts_at: int | None  # the first step that differs
    gap: float  # fp64 distance between the two tokens there, 0 where nothing differs


class PromptRecord(Record):
    """One prompt: the tokens of this runtime and of Hugging Face, and for each step how far each is from fp64.

    `margins` are the differences between the two largest logits in fp64, `our_errors` and `their_errors` the errors on
    that difference, and the logit errors the largest error of any logit of the step.
    """

    name: str
    suite: str
    prompt_ids: list[int]
    ours: list[int]  # free-running
    theirs: list[int]
    forced: list[int]  # our choice at each step after Hugging Face's own tokens (teacher forcing)
    not_the_largest: list[int]  # steps where our token is not the first argmax of our own logits
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
    """One part of the criterion and its outcome; `passed` is None where it does not apply."""

    part: str
    passed: bool | None
    measured: str
    bound: str


class Check(Record):
    """Runs that must give the same tokens; `passed` is None where they were skipped, and `detail` says why."""

    name: str
    passed: bool | None
    detail: str


class Fault(Record):
    """A fault that the audit planted itself, and whether the criterion refused it."""

    name: str
    refused: bool
    detail: str


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """The first step at which two runs of equal length differ; None where they are equal."""
    differing = (step for step, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return next(differing, None)

"""What `inspect` found: as data, and as a page of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtime.model.config import FAMILY_NAMES


@dataclass(frozen=True)
class Module:
    """A weight tensor: its name, its shape, and a note on its layout."""

    name: str
    shape: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Token:
    """A token of the prompt and its text, which is empty without a tokenizer."""

    id: int
    text: str


@dataclass(frozen=True)
class Candidate:
    """A token that may come next. Of equal logits the lower id ranks first, as in greedy decoding."""

    rank: int
    id: int
    text: str
    logit: float
    probability: float


@dataclass(frozen=True)
class Position:
    """The likeliest tokens to follow the prompt's token at an index."""

    index: int
    text: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Step:
    """One greedy step. The margin is the picked token's logit minus the runner-up's; the first step is the prefill."""

    id: int
    text: str
    margin: float
    runner_up: Candidate
    probability: float
    time_ms: float


@dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect` found. Printed, it is a page of plain text; `to_dict()` is for JSON."""

    model: str
    family: str
    device: str
    dtype: str
    parameters: int
    layers: tuple[str, ...]
    structure: tuple[Module, ...]
    prompt: tuple[Token, ...]
    logits_shape: tuple[int, int, int]
    positions: tuple[Position, ...]
    steps: tuple[Step, ...]
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        blocks = (_model(self), _prompt(self), *_positions(self), _steps(self))
        return "\n\n".join("\n".join(block) for block in blocks if block)


def _model(inspection: Inspection) -> list[str]:
    return [
        f"{FAMILY_NAMES[inspection.family]} ({inspection.model}): {inspection.parameters:,} parameters, "
        f"{inspection.dtype} on {inspection.device}",
        *(f"  {kind}" for kind in inspection.layers),
        *_table([[module.name, _shape(module.shape), module.note] for module in inspection.structure], "<<<"),
    ]


def _prompt(inspection: Inspection) -> list[str]:
    rows = [[str(i), str(token.id), _quoted(token.text)] for i, token in enumerate(inspection.prompt)]
    return [
        f"token ids {_shape((1, len(inspection.prompt)))}, logits {_shape(inspection.logits_shape)}",
        *_table([["index", "id", "token"], *rows], ">><"),
    ]


def _positions(inspection: Inspection) -> Iterable[list[str]]:
    for position in inspection.positions:
        rows = [
            [str(each.rank), _quoted(each.text), str(each.id), f"{each.logit:.4f}", f"{each.probability:.2%}"]
            for each in position.candidates
        ]
        back = len(inspection.prompt) - position.index
        yield [
            f"best to follow index {position.index} (position -{back}) {_quoted(position.text)}".rstrip(),
            *_table([["rank", "token", "id", "logit", "probability"], *rows], "><>>>"),
        ]


def _steps(inspection: Inspection) -> list[str]:
    if not inspection.steps:
        return []
    rows = [
        [
            str(number),
            _quoted(step.text),
            str(step.id),
            f"{step.probability:.2%}",
            f"{step.margin:.4f}",
            f"{_quoted(step.runner_up.text)} {step.runner_up.id}".strip(),
            f"{step.time_ms:.1f} ms",
        ]
        for number, step in enumerate(inspection.steps, start=1)
    ]
    header = ["step", "token", "id", "probability", "margin", "over", "time"]
    lines = ["greedy, step by step (the first is the prefill)", *_table([header, *rows], "><>>><>")]
    return [*lines, "", f"text: {_quoted(inspection.text)}"] if inspection.text else lines


def _table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True)] for row in rows
    ]
    return ["  " + "  ".join(row).rstrip() for row in cells]


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _quoted(text: str) -> str:
    """Text with its spaces and line breaks visible; empty text stays empty."""
    return repr(text) if text else ""

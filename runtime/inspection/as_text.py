"""An inspection as a page of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from runtime.model.config import FAMILY_NAMES

if TYPE_CHECKING:
    from runtime.inspection.inspection import Inspection


def render(seen: Inspection) -> str:
    """Lay out an inspection for a terminal or a notebook: plain text, aligned, no colours."""
    return "\n\n".join(
        "\n".join(block) for block in (_model(seen), _prompt(seen), *_positions(seen), _steps(seen)) if block
    )


def _model(seen: Inspection) -> list[str]:
    return [
        f"{FAMILY_NAMES[seen.family]} ({seen.model}): {seen.parameters:,} parameters, {seen.dtype} on {seen.device}",
        *(f"  {kind}" for kind in seen.layers),
        *_table([[module.name, _shape(module.shape), module.note] for module in seen.structure], "<<<"),
    ]


def _prompt(seen: Inspection) -> list[str]:
    rows = [[str(i), str(token.id), _quoted(token.text)] for i, token in enumerate(seen.prompt)]
    return [
        f"token ids {_shape((1, len(seen.prompt)))}, logits {_shape(seen.logits_shape)}",
        *_table([["index", "id", "token"], *rows], ">><"),
    ]


def _positions(seen: Inspection) -> Iterable[list[str]]:
    for position in seen.positions:
        rows = [
            [str(best.rank), _quoted(best.text), str(best.id), f"{best.logit:.4f}", f"{best.probability:.2%}"]
            for best in position.candidates
        ]
        back = len(seen.prompt) - position.index
        yield [
            f"best to follow index {position.index} (position -{back}) {_quoted(position.text)}".rstrip(),
            *_table([["rank", "token", "id", "logit", "probability"], *rows], "><>>>"),
        ]


def _steps(seen: Inspection) -> list[str]:
    if not seen.steps:
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
        for number, step in enumerate(seen.steps, start=1)
    ]
    header = ["step", "token", "id", "probability", "margin", "over", "time"]
    lines = ["greedy, step by step (the first is the prefill)", *_table([header, *rows], "><>>><>")]
    return [*lines, "", f"text: {_quoted(seen.text)}"] if seen.text else lines


def _table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True)] for row in rows
    ]
    return ["  " + "  ".join(row).rstrip() for row in cells]


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _quoted(text: str) -> str:
    """Text with its spaces and line breaks visible; nothing where there is no text."""
    return repr(text) if text else ""

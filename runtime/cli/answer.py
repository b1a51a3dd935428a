"""An answer as `generate` and `chat` print it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import runtime
from runtime.cli.streams import as_json, dimmed, displayed

if TYPE_CHECKING:
    from runtime.engine.result import GenerationResult
    from runtime.model.model import Model


def print_answers(
    model: Model,
    prompt: str | list[int],
    options: argparse.Namespace,
    max_new_tokens: int,
    in_json: bool,
    echo: str = "",
    skip_special_tokens: bool = True,
    n: int | None = None,
) -> tuple[list[GenerationResult], bool]:
    """Generate an answer, or several, and print them: one in pieces or as a whole, several one after another.

    Ctrl-C ends the answer early; the second value says whether it did.

    Args:
        options: `no_stream`, `stop`, `speculate` and `sampling` (further options of `runtime.stream`) are read.
        max_new_tokens: most tokens of the answer.
        in_json: whether to print JSON instead of text.
        echo: what to print in front of a streamed answer, dimmed.
        skip_special_tokens: whether the text leaves out special tokens.
        n: how many answers; None for one.
    """
    streamed, interrupted = not (in_json or options.no_stream or (n or 1) > 1), False
    with runtime.stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        stop=options.stop,
        speculate=options.speculate,
        n=n,
        **options.sampling,
        skip_special_tokens=skip_special_tokens,
    ) as pieces:
        try:
            if streamed and echo:
                print(dimmed(displayed(echo)), end="", flush=True)
            for piece in pieces:
                if streamed:
                    print(displayed(piece.text), end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
    results = pieces.results
    for number, result in enumerate(results, 1):
        if len(results) > 1 and not in_json:
            print(dimmed(f"--- answer {number} of {len(results)} ---"))
        if in_json:
            print(answer_json(model, result), flush=True)
        else:
            print("" if streamed else displayed(result.text), flush=True)
    return results, interrupted


def answer_json(model: Model, result: GenerationResult) -> str:
    """An answer as a line of JSON."""
    return as_json({"model": model.name, **result.to_dict()})

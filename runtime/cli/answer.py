"""An answer as `generate` and `chat` print it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import runtime
from runtime.cli.streams import as_json, displayed

if TYPE_CHECKING:
    from runtime.engine.result import GenerationResult
    from runtime.model.model import Model


def print_answer(
    model: Model,
    prompt: str | list[int],
    options: argparse.Namespace,
    max_new_tokens: int,
    echo: str = "",
    skip_special_tokens: bool = True,
) -> tuple[GenerationResult, bool]:
    """Generate an answer and print it, in pieces or as a whole.

    Ctrl-C ends the answer early; the second value says whether it did.

    Args:
        options: `json`, `no_stream`, `stop` and `speculate` are read.
        max_new_tokens: most tokens of the answer.
        echo: what to print in front of a streamed answer, dimmed.
        skip_special_tokens: whether the text leaves out special tokens.
    """
    streamed, interrupted = not (options.json or options.no_stream), False
    with runtime.stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        stop=options.stop,
        speculate=options.speculate,
        skip_special_tokens=skip_special_tokens,
    ) as pieces:
        try:
            if streamed and echo:
                print(f"\033[2m{displayed(echo)}\033[0m", end="", flush=True)
            for piece in pieces:
                if streamed:
                    print(displayed(piece.text), end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
    result = pieces.results[0]
    if options.json:
        print(as_json({"model": model.name, **result.to_dict()}), flush=True)
    else:
        print("" if streamed else displayed(result.text), flush=True)
    return result, interrupted

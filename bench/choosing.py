"""What each way of choosing tokens costs beside greedy decoding.

    python -m runtime.bench.choosing --out bench/results/choosing-cpu.json

One prompt is answered in every way in turn, in one process; a way's speed is the median of the rounds' ratios to
greedy, so that other load on the machine, which changes within seconds, affects all alike. A way that gives other
tokens in another round, or one that must have greedy's tokens and has not, leaves no speeds in the report.

Progress goes to stderr; the report, JSON, is written to FILE and its last line to stdout. Exit codes: 0 done; 1 tokens
differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import runtime
from runtime.bench.environment import environment
from runtime.bench.output import publish
from runtime.cli.arguments import whole

DIFFERENT = 1
PROMPT = "The history of the city begins"
TO_THE_END = {"ignore_eos": True}  # every answer has all of its tokens
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 64},
    "top_p": {"temperature": 1.0, "top_p": 0.95},
    "top_k and top_p": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "logit_bias": {"logit_bias": {107: -5.0}},
    "logprobs": {"logprobs": 5},
    "response_format": {"response_format": {"regex": "[A-Z][a-z ,.]{2000}"}, "ignore_eos": False},
}
AS_GREEDY = ("logprobs",)  # these choose greedy's tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and reports.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    tokens: dict[str, set[tuple[int, ...]]] = {way: set() for way in WAYS}
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    with runtime.load(options.model, device="cpu", dtype=options.dtype, max_batch=1, progress=False) as model:
        for number in range(-1, options.repeat):  # the first round warms up
            for way, choice in list(WAYS.items())[:: -1 if number % 2 else 1]:
                result = runtime.generate(
                    model, PROMPT, max_new_tokens=options.gen_len, reuse=False, seed=7, **TO_THE_END | choice
                )
                tokens[way].add(result.token_ids)
                if number >= 0:
                    speeds[way].append(result.stats.decode_tokens_per_s or 0.0)
    different = [way for way in WAYS if len(tokens[way] | (tokens["greedy"] if way in AS_GREEDY else set())) > 1]
    report: dict[str, Any] = {
        "benchmark": "choosing",
        "model": options.model,
        "dtype": options.dtype,
        "gen_len": options.gen_len,
        "rounds": options.repeat,
        "environment": environment(torch.device("cpu")).model_dump(mode="json"),
        "different": different,
        "ways": {} if different else {way: _speeds(speeds, way) for way in WAYS},
    }
    for way, found in report["ways"].items():
        print(f"{way:20} {found['tokens_per_s']:6.1f} tokens/s, {found['of_greedy']:.3f} of greedy", file=sys.stderr)
    if different:
        print(f"tokens differ: {', '.join(different)}", file=sys.stderr)
    publish(report, options.out)
    return DIFFERENT if different else 0


def _speeds(speeds: dict[str, list[float]], way: str) -> dict[str, Any]:
    return {
        "options": WAYS[way],
        "tokens_per_s": statistics.median(speeds[way]),
        "of_greedy": statistics.median(a / b for a, b in zip(speeds[way], speeds["greedy"], strict=True)),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", metavar="NAME", help="folder, .gguf file or hub id (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", metavar="D", help="(%(default)s)")
    parser.add_argument("--gen-len", type=whole(2), default=64, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--repeat", type=whole(1), default=15, metavar="N", help="rounds (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())

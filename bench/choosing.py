"""What each way of choosing tokens costs compared with greedy decoding.

    python -m runtime.bench.choosing --out bench/results/choosing-cpu.json

One prompt is answered in every way in turn, in one process; a way's speed is the median of the rounds' ratios to
greedy, so that other load on the machine, which changes within seconds, affects all alike. If a way's tokens differ
from round to round, or from greedy's where they must be the same, the report has no speeds, and the exit code is 1.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import runtime
from runtime.bench.experiment import parser, publish

DIFFERENT = 1
PROMPT = "The history of the city begins"
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
    """Measures and reports; returns the exit code."""
    sizes = {"gen_len": (64, 2, "tokens"), "repeat": (15, 1, "rounds")}
    options = parser(__doc__, "bfloat16", **sizes).parse_args(arguments)
    tokens: dict[str, set[tuple[int, ...]]] = {way: set() for way in WAYS}
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    with runtime.load(options.model, device="cpu", dtype=options.dtype, max_batch=1, progress=False) as model:
        for number in range(-1, options.repeat):  # the first round warms up
            for way, choice in list(WAYS.items())[:: -1 if number % 2 else 1]:
                given = {"max_new_tokens": options.gen_len, "ignore_eos": True, "reuse": False, "seed": 7} | choice
                result = runtime.generate(model, PROMPT, **given)
                tokens[way].add(result.token_ids)
                if number >= 0:
                    speeds[way].append(result.stats.decode_tokens_per_s or 0.0)
    different = [way for way in WAYS if len(tokens[way] | (tokens["greedy"] if way in AS_GREEDY else set())) > 1]
    if different:
        print(f"tokens differ: {', '.join(different)}", file=sys.stderr)
    found: dict[str, Any] = {}
    for way, choice in WAYS.items() if not different else ():
        speed = statistics.median(speeds[way])
        ratio = statistics.median(a / b for a, b in zip(speeds[way], speeds["greedy"], strict=True))
        found[way] = {"options": choice, "tokens_per_s": speed, "of_greedy": ratio}
        print(f"{way:20} {speed:6.1f} tokens/s, {ratio:.3f} of greedy", file=sys.stderr)
    publish("choosing", options, {"different": different, "ways": found})
    return DIFFERENT if different else 0


if __name__ == "__main__":
    sys.exit(main())

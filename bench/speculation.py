"""What prompt-lookup speculation gains where answers repeat their prompts, and what it costs where they do not.

    python -m runtime.bench.speculation --out bench/results/speculation-cpu.json

Every prompt of prompts/speculation.json is answered plainly and with speculation in turn, in one process; a prompt's
gain is the median of the rounds' ratios, so that other load on the machine, which changes within seconds, affects both
alike. Answers that differ leave no speeds in the report, and the exit code is 1. Small models repeat themselves
wherever greedy decoding takes them, so "new" prompts, which ask for something new, gain too; see `tokens_per_step` for
what was repeated after all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runtime
from runtime.bench.experiment import parser, publish
from runtime.engine.options import Speculate
from runtime.engine.result import GenerationResult
from runtime.model.model import Model

DIFFERENT = 1
PROMPTS = Path(__file__).parent / "prompts" / "speculation.json"
WAYS: tuple[Speculate, ...] = (None, "prompt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and reports; returns the exit code."""
    sizes = {"gen_len": (48, 2, "tokens"), "repeat": (3, 1, "rounds")}
    options = parser(__doc__, "bfloat16,float32", **sizes).parse_args(arguments)
    dtypes: dict[str, Any] = {}
    for dtype in options.dtype.split(","):
        with runtime.load(options.model, device="cpu", dtype=dtype, max_seq_len=1024, progress=False) as model:
            dtypes[dtype] = _measured(model, options)
    publish("speculation", options, {"dtypes": dtypes})
    return DIFFERENT if any(found["different"] for found in dtypes.values()) else 0


def read_prompts() -> dict[str, dict[str, str]]:
    """The committed prompts by name, of each kind: "repeating" and "new"."""
    kinds: dict[str, dict[str, str]] = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return kinds


def _measured(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    by_kind = {
        kind: {name: _row(model, prompt, options) for name, prompt in prompts.items()}
        for kind, prompts in read_prompts().items()
    }
    different = [name for rows in by_kind.values() for name, row in rows.items() if row is None]
    if different:
        print(f"{model.runtime.dtype}: tokens differ: {', '.join(different)}", file=sys.stderr)
        return {"different": different}
    found: dict[str, Any] = {"different": []}
    for kind, rows in by_kind.items():
        speeds = [row for row in rows.values() if row is not None]
        medians = {key: statistics.median(row[key] for row in speeds) for key in speeds[0]}
        least = min(row["gain_ratio"] for row in speeds)
        found[kind] = {**medians, "least_gain_ratio": least, "prompts": rows}
        print(
            f"{model.runtime.dtype}, {kind}: gain {medians['gain_ratio']:.2f}, the least of {len(rows)} {least:.2f}",
            file=sys.stderr,
        )
    return found


def _row(model: Model, prompt: str, options: argparse.Namespace) -> dict[str, float] | None:
    """A prompt's speeds, decoding alone; None where tokens differ."""
    answers: dict[Speculate, list[GenerationResult]] = {way: [] for way in WAYS}
    given: dict[str, Any] = {"max_new_tokens": options.gen_len, "ignore_eos": True, "reuse": False}
    for number in range(options.repeat):
        for way in WAYS[:: -1 if number % 2 else 1]:
            answers[way].append(runtime.generate(model, prompt, speculate=way, **given))
    if len({result.token_ids for results in answers.values() for result in results}) > 1:
        return None
    plain, speculated = ([result.stats.decode_tokens_per_s or 0.0 for result in answers[way]] for way in WAYS)
    read, read_speculated = (answers[way][0].stats.bytes_per_token or 1 for way in WAYS)
    return {
        "plain_tokens_per_s": statistics.median(plain),
        "speculated_tokens_per_s": statistics.median(speculated),
        "gain_ratio": statistics.median(b / a for a, b in zip(plain, speculated, strict=True)),
        "tokens_per_step": read / read_speculated,  # but for the cache, which is a small part of what is read
    }


if __name__ == "__main__":
    sys.exit(main())

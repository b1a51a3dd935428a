"""What prompt-lookup speculation gains where answers repeat their prompts, and what it costs where they do not.

    python -m runtime.bench.speculation --out bench/results/speculation-cpu.json

Every prompt of prompts/speculation.json is answered plainly and speculated in turns, in one process; a prompt's gain is
the median of the rounds' ratios, so that other load on the machine, which changes within seconds, affects both alike.
Answers that differ leave no speeds in the report. Small models repeat themselves wherever greedy decoding takes them,
so "new" prompts, which ask for something new, gain too; see `tokens_per_step` for what was repeated after all.

Progress goes to stderr; the report, JSON, is written to FILE and its last line to stdout. Exit codes: 0 done; 1 tokens
differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import runtime
from runtime.bench.command import comma_list
from runtime.bench.environment import environment
from runtime.bench.output import publish
from runtime.cli.arguments import whole
from runtime.engine.options import Speculate
from runtime.engine.result import GenerationResult
from runtime.model.model import Model

DIFFERENT = 1
PROMPTS = Path(__file__).parent / "prompts" / "speculation.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and reports.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    report: dict[str, Any] = {
        "benchmark": "speculation",
        "model": options.model,
        "gen_len": options.gen_len,
        "rounds": options.repeat,
        "environment": environment(torch.device("cpu")).model_dump(mode="json"),
        "dtypes": {},
    }
    code = 0
    for dtype in options.dtype:
        with runtime.load(options.model, device="cpu", dtype=dtype, max_seq_len=1024, progress=False) as model:
            found = report["dtypes"][dtype] = _measured(model, options)
        if found["different"]:
            print(f"{dtype}: tokens differ: {', '.join(found['different'])}", file=sys.stderr)
            code = DIFFERENT
    publish(report, options.out)
    return code


def answer(model: Model, prompt: str, gen_len: int, speculate: Speculate) -> GenerationResult:
    """One answer, from an empty prefix cache."""
    return runtime.generate(
        model, prompt, max_new_tokens=gen_len, ignore_eos=True, reuse=False, speculate=speculate
    )  # fmt: skip


def read_prompts() -> dict[str, dict[str, str]]:
    """The committed prompts by name, of each kind: "repeating" and "new"."""
    kinds: dict[str, dict[str, str]] = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return kinds


def _measured(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    by_kind = {
        kind: {name: _row(model, prompt, options) for name, prompt in prompts.items()}
        for kind, prompts in read_prompts().items()
    }
    found: dict[str, Any] = {
        "different": [name for rows in by_kind.values() for name, row in rows.items() if row is None]
    }
    for kind, rows in ({} if found["different"] else by_kind).items():
        speeds = [row for row in rows.values() if row is not None]
        medians = {key: statistics.median(row[key] for row in speeds) for key in speeds[0]}
        least = min(row["gain_ratio"] for row in speeds)
        found[kind] = {**medians, "least_gain_ratio": least, "prompts": rows}
        speeds_in_words = " plain, ".join(f"{medians[f'{way}_tokens_per_s']:.1f}" for way in ("plain", "speculated"))
        print(
            f"{model.runtime.dtype}, {kind}: {speeds_in_words} speculated tokens/s; gain {medians['gain_ratio']:.2f}, "
            f"the least of {len(rows)} prompts {least:.2f}",
            file=sys.stderr,
        )
    return found


def _row(model: Model, prompt: str, options: argparse.Namespace) -> dict[str, float] | None:
    """A prompt's speeds, decoding alone; None where tokens differ."""
    answers: dict[Speculate, list[GenerationResult]] = {None: [], "prompt": []}
    ways: list[Speculate] = [None, "prompt"]
    for number in range(options.repeat):
        for speculate in ways[:: -1 if number % 2 else 1]:
            answers[speculate].append(answer(model, prompt, options.gen_len, speculate))
    if len({result.token_ids for results in answers.values() for result in results}) > 1:
        return None
    plain, speculated = ([result.stats.decode_tokens_per_s or 0.0 for result in answers[way]] for way in ways)
    read, read_speculated = (answers[way][0].stats.bytes_per_token or 1 for way in ways)
    return {
        "plain_tokens_per_s": statistics.median(plain),
        "speculated_tokens_per_s": statistics.median(speculated),
        "gain_ratio": statistics.median(b / a for a, b in zip(plain, speculated, strict=True)),
        "tokens_per_step": read / read_speculated,  # but for the cache, which is a small part of what is read
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", metavar="NAME", help="folder, .gguf file or hub id (%(default)s)")
    parser.add_argument(
        "--dtype", type=comma_list(str), default=["bfloat16", "float32"], metavar="D,...", help="(bfloat16,float32)"
    )
    parser.add_argument("--gen-len", type=whole(2), default=48, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--repeat", type=whole(1), default=3, metavar="N", help="rounds (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())

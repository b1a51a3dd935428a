"""How far simulated decode steps are from measured ones.

    python -m runtime.bench.predicted STEPS.json [--models gemma-3-270m,...] [--contexts 128,512] [--out FILE]

STEPS.json comes from the GPU campaign, with this version's kernels and this version of Triton: another one compiles to
different code. Every figure that it prints as simulated comes from runtime.cost.simulator and is no measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from runtime.cost.plan import TARGETS, Target, make_plan
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED


def compared(steps: dict[str, Any], models: Sequence[str], contexts: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each measured step of one graph with dependent launch."""
    name = steps["machine"]["gpu"]
    (target,) = (each for each in TARGETS.values() if each.gpu.name == name)
    target = Target(target.gpu, steps["machine"]["read_gb_s"], "measured beside the steps")
    rows = []
    for row in steps["rows"]:
        wanted = row["model"] in models and row["context"] in contexts
        if not (wanted and row["steps_per_graph"] == 1 and row["dependent_launch"]):
            continue
        model, batch, context = row["model"], row["batch"], row["context"]
        config = ModelConfig.from_hf(PUBLISHED[model])
        plan = make_plan(config, model, row["dtype"], target, batch=batch, context=context, predict=True)
        found, measured = dict(zip(plan.simulated_with, plan.simulated_step_us, strict=True)), row["step_us"]
        sizes = {"model": model, "batch": batch, "context": context}
        rows.append(sizes | {"measured_us": measured, "simulated_us": found})
        shown = ", ".join(f"{us:,.0f} ({us / measured - 1:+.1%})" for us in found.values())
        print(f"{', '.join(map(str, sizes.values()))}: {measured:,.0f} us, simulated {shown}", file=sys.stderr)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path)
    parser.add_argument("--models", default=",".join(PUBLISHED), help="default: all")
    parser.add_argument("--contexts", default="128,512,1024,4096", help="default: 128,512,1024,4096")
    parser.add_argument("--out", type=Path, help="a file for the result as JSON")
    options = parser.parse_args(arguments)
    steps = json.loads(options.steps.read_text())
    rows = compared(steps, options.models.split(","), [int(number) for number in options.contexts.split(",")])
    if not rows:
        parser.error(f"{options.steps} has no step of these models and contexts")
    errors = {
        fit: [math.log(row["simulated_us"][fit] / row["measured_us"]) for row in rows]
        for fit in rows[0]["simulated_us"]
    }
    result = {
        "measured": str(options.steps),
        "gpu": steps["machine"]["gpu"],
        "triton": triton.__version__,
        "rms_log_error": {fit: math.hypot(*found) / math.sqrt(len(found)) for fit, found in errors.items()},
        "least_and_most": {fit: [math.exp(min(found)) - 1, math.exp(max(found)) - 1] for fit, found in errors.items()},
    }
    if options.out:
        options.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

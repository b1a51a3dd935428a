"""Decode speed of this runtime and of Hugging Face's generate on one model, in one process, run by run in turn.

    python -m runtime.bench.decode_vs_hf [--model demo] [--dtype bfloat16,float32] [--tokens 64] [--out FILE]

Both sides are timed from outside, through what a user calls: `runtime.stream` and `generate` with a streamer, greedy,
dynamic cache, one sequence. Before any timing their tokens must be equal, else it exits with 1. Decode speed is
(tokens - 1) / (time of the last token - time of the first); its ceiling is the read bandwidth, measured in the same
run, over the bytes that a step must read. The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import runtime
from runtime import sources
from runtime.bandwidth import read_bandwidth_gb_s

PROMPT = "A dog running through the snow is"


class TokenTimes:
    """A streamer for Hugging Face's generate that notes when each token is there; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Ours:
    name = "gemma-runtime"

    def __init__(self, source: str, dtype: str) -> None:
        self.model = runtime.load(source, dtype=dtype, max_seq_len=1024)

    def run(self, ids: list[int], tokens: int) -> tuple[list[int], float, list[float]]:
        """The new tokens, the time of the call and the time of each token, in seconds."""
        new: list[int] = []
        times: list[float] = []
        start = time.perf_counter()
        for piece in runtime.stream(self.model, ids, max_new_tokens=tokens, ignore_eos=True):
            times.append(time.perf_counter())
            new.extend(piece.token_ids)
        return new, start, times


class HuggingFace:
    name = "Hugging Face"

    def __init__(self, source: str, dtype: str, device: torch.device) -> None:
        folder = sources.resolve(source)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(device)
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    def run(self, ids: list[int], tokens: int) -> tuple[list[int], float, list[float]]:
        prompt = torch.tensor([ids], device=self.model.device)
        streamer, start = TokenTimes(), time.perf_counter()
        sequences = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, streamer=streamer
        )
        return sequences[0, len(ids) :].tolist(), start, streamer.times[1:]


def compare(source: str, dtype: str, tokens: int, repeat: int) -> dict[str, Any]:
    """Time both sides in one dtype.

    Returns:
        Per side the raw samples and medians; the ratio of the median decode speeds; read bandwidth and the decode
        speed that it allows.

    Raises:
        SystemExit: their tokens differ.
    """
    ours = Ours(source, dtype)
    theirs = HuggingFace(source, dtype, ours.model.device)
    assert ours.model.tokenizer is not None, "the benchmark's prompt is text"
    ids = ours.model.tokenizer.encode(PROMPT)

    expected, found = theirs.run(ids, tokens)[0], ours.run(ids, tokens)[0]
    if found != expected:
        step = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        raise SystemExit(
            f"{dtype}: no timing, tokens differ at {step}: ours {found[step]}, Hugging Face {expected[step]}"
        )

    samples: dict[str, dict[str, list[float]]] = {
        side.name: {"ttft_ms": [], "tokens_per_s": []} for side in (ours, theirs)
    }
    for repetition in range(repeat):
        for side in (ours, theirs) if repetition % 2 else (theirs, ours):
            _, start, times = side.run(ids, tokens)
            samples[side.name]["ttft_ms"].append((times[0] - start) * 1e3)
            samples[side.name]["tokens_per_s"].append((tokens - 1) / (times[-1] - times[0]))

    result: dict[str, Any] = {"dtype": dtype, "prompt_tokens": len(ids), "new_tokens": tokens, "tokens_equal": True}
    for name, side_samples in samples.items():
        result[name] = {f"{key}_median": statistics.median(values) for key, values in side_samples.items()}
        result[name]["samples"] = side_samples
    speeds = [result[name]["tokens_per_s_median"] for name in (Ours.name, HuggingFace.name)]
    bytes_per_token = ours.model.plan.bytes_per_token(len(ids) + tokens // 2)
    bandwidth_gb_s = read_bandwidth_gb_s(ours.model.device)
    return result | {
        "decode_ratio": speeds[0] / speeds[1],
        "bytes_per_token": bytes_per_token,
        "read_bandwidth_gb_s": bandwidth_gb_s,
        "ceiling_tokens_per_s": bandwidth_gb_s * 1e9 / bytes_per_token,
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gemma_runtime": runtime.__version__,
        "commit": commit(),
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the sources, "+changes" where they differ from it; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench.decode_vs_hf", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", default="demo", help="as for runtime.load (default: demo)")
    parser.add_argument("--dtype", default="bfloat16,float32", help="one or more, comma-separated")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per run (default: 64)")
    parser.add_argument("--repeat", type=int, default=7, help="timed runs per side (default: 7)")
    parser.add_argument("--out", type=Path, help="write the result here too")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.repeat < 1:
        parser.error("--tokens must be at least 2 and --repeat at least 1")

    transformers.utils.logging.disable_progress_bar()
    result: dict[str, Any] = {
        "benchmark": "decode_vs_hf",
        "model": options.model,
        "environment": environment(),
        "runs": [],
    }
    print(f"{'dtype':<10} {'':<14} {'TTFT ms':>9} {'tokens/s':>9} {'min':>7} {'max':>7}")
    for dtype in options.dtype.split(","):
        try:
            run = compare(options.model, dtype, options.tokens, options.repeat)
        except (ValueError, TypeError, OSError, ImportError) as error:
            parser.error(str(error))
        result["runs"].append(run)
        for name in (Ours.name, HuggingFace.name):
            side, speeds = run[name], run[name]["samples"]["tokens_per_s"]
            print(
                f"{dtype:<10} {name:<14} {side['ttft_ms_median']:9.1f} {side['tokens_per_s_median']:9.2f} "
                f"{min(speeds):7.2f} {max(speeds):7.2f}"
            )
        print(f"{dtype:<10} {'ceiling':<14} {'':>9} {run['ceiling_tokens_per_s']:9.2f}")
        print(f"{dtype:<10} {'ratio':<14} {'':>9} {run['decode_ratio']:9.2f}", flush=True)
    print(json.dumps(result), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One measured session on a GPU: ceilings, correctness, kernels, whole steps, and Hugging Face on the same weights.

    python -m runtime.bench.gpu --out FILE [--models gemma-1.1-2b,...] [--parts speeds,...] [--minutes 9] [--compile]

The weights are random, of the published shapes (runtime.bench.shapes). A model's correctness gate runs before its
speeds: captured against eager steps, a row alone against the same row in a batch of 8, fp32 tokens against Hugging
Face's; beside it, an audit of the errors in bf16. A gate that fails ends the run with exit code 1. The file is
rewritten after every part, so that a run cut short leaves what it has measured. No part begins after --minutes.

Times are medians with their 10th and 90th percentile; GB/s counts the bytes that a step must read (every weight once,
the tied table once, the cached keys and values that its layers look at).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
import triton.language as tl

from runtime.bench.gates import PROMPT, audit, gate, graph_of, start
from runtime.bench.hugging_face import greedy, hugging_face
from runtime.bench.shapes import SHAPES, random_model
from runtime.bench.tune import Case, cases, launcher, replays_us, time_us
from runtime.config import ModelConfig
from runtime.decode import new_state, tokens
from runtime.kernels.launch import let_next_kernel_start, wait_for_previous_kernel
from runtime.prefill import prefill

MAX_SEQ_LEN = 4352
PARTS = ("speeds", "kernels", "host_loop", "hugging_face")


@triton.jit
def read_kernel(out_ptr, x_ptr, elements, BLOCK: tl.constexpr):
    # One program reads a run of its own and leaves one word, so that the reading cannot be left out.
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, elements, BLOCK):
        total ^= tl.load(x_ptr + program.to(tl.int64) * elements + offset + tl.arange(0, BLOCK))
    tl.store(out_ptr + program, tl.sum(total, axis=0))


@triton.jit
def empty_kernel(out_ptr, USE_DEPENDENT_LAUNCH: tl.constexpr):
    # What a launch costs that does nothing.
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    tl.store(out_ptr + tl.program_id(0), 0)


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    shown = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "nvidia_smi": shown.stdout.strip().splitlines(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip() or None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def ceilings() -> dict[str, float]:
    """What the GPU can do at best: bandwidth of reading and of copying, and the cost of an empty launch in a graph."""
    buffer = torch.randint(0, 1 << 30, (1 << 30,), device="cuda", dtype=torch.int32)
    out = torch.empty(1 << 16, device="cuda", dtype=torch.int32)
    reads = []
    for programs, block in ((132 * 8, 2048), (4096, 4096), (16384, 8192)):
        elements = buffer.numel() // programs // block * block
        launch = partial(read_kernel[(programs,)], out, buffer, elements, BLOCK=block, num_warps=4)
        reads.append(elements * programs * 4 / time_us(launch) / 1e3)
    other = torch.empty_like(buffer)
    copied = buffer.numel() * 8 / time_us(partial(_repeat, partial(other.copy_, buffer), 1)) / 1e3
    result = {"read_gb_s": max(reads), "copy_gb_s": copied}
    for dependent in (False, True):
        launch = partial(empty_kernel[(132,)], out, USE_DEPENDENT_LAUNCH=dependent, launch_pdl=dependent, num_warps=4)
        name = "empty_dependent_launch_us" if dependent else "empty_launch_us"
        result[name] = time_us(partial(_repeat, launch, 930)) / 930
    return result


def speeds(name: str, read_gb_s: float) -> list[dict[str, Any]]:
    """Decode steps of one model in bf16 over contexts, batches and steps in one graph."""
    model = random_model(name, "cuda", "bfloat16", max_seq_len=MAX_SEQ_LEN, max_batch=8)
    rows = []
    for batch, steps, contexts in (
        (1, 1, (128, 1024, 4096)),
        (1, 8, (128,)),
        (2, 1, (128,)),
        (4, 1, (128,)),
        (8, 1, (128, 1024)),
    ):
        state = new_state(model, batch)
        start(model, state, 0)
        began = time.perf_counter()
        graph = graph_of(model, state, steps)
        capture_s = time.perf_counter() - began
        for context in contexts:
            state.position.fill_(context - 1)
            samples = [sample / steps for sample in replays_us(graph.replay, 60 if steps == 1 else 20)]
            median = statistics.median(samples)
            # A batch reads the weights once, and the cache of every row.
            weights = model.plan.weights
            needed = weights + batch * (model.plan.bytes_per_token(context) - weights)
            row = {
                "model": name,
                "dtype": "bfloat16",
                "batch": batch,
                "context": context,
                "steps_per_graph": steps,
                "step_us": median,
                "p10_us": samples[len(samples) // 10],
                "p90_us": samples[len(samples) * 9 // 10],
                "tokens_per_s": batch * 1e6 / median,
                "bytes_per_step": needed,
                "bandwidth_gb_s": needed / median / 1e3,
                "share_of_read_bandwidth": needed / median / 1e3 / read_gb_s,
                "warm_up_and_capture_s": capture_s,
            }
            rows.append(row)
            print(
                f"   {name} batch {batch} context {context} x{steps}: {median:.1f} us, "
                f"{row['tokens_per_s']:.0f} tokens/s, {row['share_of_read_bandwidth']:.1%} of read bandwidth",
                flush=True,
            )
    return rows


def host_loop(name: str) -> dict[str, Any]:
    """The same model through the host's loop: what a caller of the runtime waits for, prefill and reading included."""
    model = random_model(name, "cuda", "bfloat16", max_seq_len=MAX_SEQ_LEN)
    state = new_state(model, 1)
    result: dict[str, Any] = {"model": name, "dtype": "bfloat16"}
    for length in (128, 512, 2048):
        prompt = [5 + i % 1000 for i in range(length)]
        samples = []
        for _ in range(6):
            began = time.perf_counter()
            int(prefill(model, state, 0, prompt))
            samples.append((time.perf_counter() - began) * 1e3)
        result[f"ttft_{length}_ms"] = statistics.median(samples[1:])
    samples = []
    for _ in range(5):
        prefill(model, state, 0, [5 + i for i in range(PROMPT)])
        torch.cuda.synchronize()
        began = time.perf_counter()
        count = sum(1 for _ in tokens(model, state, 256))
        samples.append(count / (time.perf_counter() - began))
    result["tokens_per_s"] = statistics.median(samples[1:])
    result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(f"   {name} through the host's loop: {result}", flush=True)
    return result


def peers(name: str, compiled: bool) -> list[dict[str, Any]]:
    """Hugging Face's decode speed on the same weights: time of 72 tokens less time of 8, over 64."""
    model = random_model(name, "cuda", "bfloat16", max_seq_len=1024)
    theirs = hugging_face(name, model)
    prompt = [5 + i for i in range(PROMPT)]
    kinds: dict[str, dict[str, Any]] = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }
    if compiled:
        kinds["static, torch.compile"] = {"cache_implementation": "static"}
    rows = []
    for kind, extra in kinds.items():
        samples = []
        for _ in range(4):
            times = []
            for count in (8, 72):
                torch.cuda.synchronize()
                began = time.perf_counter()
                greedy(theirs, prompt, count, **extra)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            samples.append(64 / (times[1] - times[0]))
        row = {
            "model": name,
            "dtype": "bfloat16",
            "cache": kind,
            "tokens_per_s": statistics.median(samples[1:]),
            "samples": samples,
        }
        rows.append(row)
        print(f"   Hugging Face {name} {kind}: {row['tokens_per_s']:.1f} tokens/s", flush=True)
    return rows


def kernel_times(name: str, read_gb_s: float) -> list[dict[str, Any]]:
    """Each matrix-vector kernel of a model at 1 and 8 rows, beside PyTorch's product of the same matrix."""
    rows = []
    for case in cases(ModelConfig.from_hf(SHAPES[name])):
        size = case.outputs * case.matrices * case.width * 2
        copies = int(max(2, min(40, 600e6 // size)))
        times = {}
        for count in (1, 8):
            run = launcher(case, torch.bfloat16, copies, count)
            times[count] = time_us(partial(_each, run, range(copies), None)) / copies
        weights = torch.randn(copies, case.outputs * case.matrices, case.width, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(1, case.width, device="cuda", dtype=torch.bfloat16)
        plain = time_us(partial(_each, partial(torch.nn.functional.linear, x), weights)) / copies
        rows.append(_kernel_row(name, case, size, times, plain, read_gb_s))
        del weights
    return rows


def _each(run: Callable[..., Any], items: Iterable[Any], *rest: Any) -> None:
    for item in items:
        run(item, *rest)


def _repeat(run: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        run()


def _kernel_row(name: str, case: Case, size: int, times: dict[int, float], plain: float, read: float) -> dict[str, Any]:
    rate = size / times[1] / 1e3
    shown = f"{times[1]:.2f} us, {rate:.0f} GB/s, torch {plain:.2f} us, 8 rows {times[8]:.2f} us"
    print(f"   {name} {case.key('bfloat16')}: {shown}", flush=True)
    return {
        "model": name,
        "kernel": case.kernel,
        "outputs": case.outputs,
        "width": case.width,
        "time_us": times[1],
        "time_8_rows_us": times[8],
        "bandwidth_gb_s": rate,
        "share_of_read_bandwidth": rate / read,
        "torch_linear_us": plain,
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--models", default="gemma-1.1-2b,gemma-3-270m,gemma-3-1b,gemma-2-2b")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure after the gates; may be empty")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no part after this time")
    parser.add_argument(
        "--compile", action="store_true", help="measure Hugging Face's compiled static cache too (slow)"
    )
    args = parser.parse_args(argv)
    names, chosen = args.models.split(","), list(filter(None, args.parts.split(",")))
    for option, given, known in (("--models", names, SHAPES), ("--parts", chosen, PARTS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device is found; this command measures one")
    deadline = time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {"schema": 1, "environment": environment(), "ceilings": ceilings(), "gates": []}
    read = result["ceilings"]["read_gb_s"]
    print(json.dumps(result, indent=1), flush=True)
    for name in names:
        for dtype in ("float32", "bfloat16"):
            result["gates"].append(gate(name, dtype))
            print("   gate", result["gates"][-1], flush=True)
            _free()
    result["audits"] = [audit(name) for name in names]
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if not all(row["passed"] for row in result["gates"]):
        print("a correctness gate failed: no speed is measured")
        return 1
    parts: dict[str, Callable[[str], Any]] = {
        "speeds": lambda name: speeds(name, read),
        "kernels": lambda name: kernel_times(name, read),
        "host_loop": lambda name: [host_loop(name)],
        "hugging_face": lambda name: peers(name, args.compile),
    }
    for part in chosen:
        for name in names:
            if time.monotonic() > deadline:
                result.setdefault("not_measured", []).append(f"{part}: {name}")
                continue
            result.setdefault(part, []).extend(parts[part](name))
            _free()
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    raise SystemExit(main())

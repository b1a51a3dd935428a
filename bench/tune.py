"""Searches the block shapes of the matrix-vector kernels on the GPU at hand and writes kernels/blocks/<gpu>.json.

    python -m runtime.bench.tune [--models gemma-1.1-2b,gemma-3-270m] [--dtype bfloat16] [--out FILE]

Every candidate is first held to the default block's result, then timed in a CUDA graph of launches over distinct copies
of the weights, so that none is found in L2. The best median wins; a row's sums depend on the block, so a new table
means new last bits, and a new parity run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from runtime import kernels
from runtime.bench.shapes import SHAPES
from runtime.config import ModelConfig
from runtime.kernels import launch
from runtime.kernels.argmax import new_best
from runtime.kernels.attention_runs import AttentionParts
from runtime.kernels.launch import Block

WEIGHT_BYTES = 600e6  # distinct weights in one timed graph, many times the L2
LAUNCHES = 40  # at least, in one timed graph


class Case(NamedTuple):
    """One kernel at one shape."""

    kernel: str
    outputs: int
    width: int
    has_branch: bool

    @property
    def matrices(self) -> int:
        return 2 if self.kernel == "gated_mlp" else 1

    def key(self, dtype: str) -> str:
        """The name of this case in a block table."""
        return f"{self.kernel}:{self.outputs}x{self.width}:{dtype}"


def cases(config: ModelConfig) -> list[Case]:
    """The matrix-vector products of one model's decode step."""
    branch = config.family != "gemma"
    return [
        Case("qkv_projection", (config.heads + 2 * config.kv_heads) * config.head_dim, config.hidden, branch),
        Case("output_projection", config.hidden, config.heads * config.head_dim, branch),
        Case("gated_mlp", config.intermediate, config.hidden, branch),
        Case("residual_linear", config.hidden, config.intermediate, branch),
        Case("lm_head_argmax", config.vocab, config.hidden, branch),
    ]


def candidates(case: Case) -> list[Block]:
    """Blocks that keep 16 to 128 weight elements in each thread."""
    columns = triton.next_power_of_2(case.width)
    rows = (4, 6, 8, 16) if case.kernel == "output_projection" else (1, 2, 4, 8, 16)
    blocks = [Block(count, columns, warps) for count in rows for warps in (2, 4, 8, 16)]
    return [block for block in blocks if 16 <= block.rows * columns * case.matrices // (32 * block.warps) <= 128]


def launcher(case: Case, dtype: torch.dtype, copies: int, rows: int = 1) -> Callable[[int, Block | None], torch.Tensor]:
    """A function that launches the case on copy i of its random weights with a block, and returns its output."""
    made: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    weights = torch.randn(copies, case.outputs * case.matrices, case.width, **made) * case.width**-0.5
    x, branch, x_out = (torch.randn(rows, case.width, **made) for _ in range(3))
    norm = torch.randn(case.width, **made) * 0.1
    residual = None if case.has_branch else torch.randn(rows, case.outputs, **made)
    out = torch.full((rows, case.outputs), float("nan"), **made)
    token, best = torch.zeros(rows, dtype=torch.int64, device="cuda"), new_best(rows, torch.device("cuda"))
    # A context of 128 tokens in heads of 256, as every shape here has them.
    attention = AttentionParts.allocate(rows, case.width // 256, 256, dtype, torch.device("cuda"))
    attention.stats.fill_(1.0)
    attention.partial.normal_()
    position = torch.full((rows,), 127, dtype=torch.int32, device="cuda")
    joined: dict[str, Any] = {"branch": branch, "branch_norm": norm} if case.has_branch else {}
    stored: dict[str, Any] = {"x_out": x_out} if case.has_branch else {}

    def run(copy: int, block: Block | None) -> torch.Tensor:
        weight = weights[copy]
        if case.kernel == "qkv_projection":
            kernels.qkv_projection(out, x, norm, weight, eps=1e-6, block=block, **joined, **stored)
        elif case.kernel == "gated_mlp":
            kernels.gated_mlp(out, x, norm, weight, eps=1e-6, block=block, **joined, **stored)
        elif case.kernel == "output_projection":
            heads = case.width // 256
            kernels.output_projection(out, attention, position, weight, heads=heads, residual=residual, block=block)
        elif case.kernel == "residual_linear":
            kernels.residual_linear(out, x, weight, residual=residual, block=block)
        else:
            kernels.lm_head_argmax(token, x, norm, weight, eps=1e-6, scratch=best, block=block, **joined)
            return token
        return out

    return run


def time_us(run: Callable[[], None], repeats: int = 9) -> float:
    """Median time of one replay of a graph of what `run` launches, in microseconds."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        with torch.cuda.graph(graph, stream=stream):
            run()
    return statistics.median(replays_us(graph.replay, repeats))


def replays_us(replay: Callable[[], None], count: int) -> list[float]:
    """Sorted device times of single replays, after three that do not count, in microseconds."""
    samples = []
    for _ in range(count + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3)
    return sorted(samples[3:])


def search(case: Case, dtype: torch.dtype) -> list[tuple[float, Block]]:
    """All candidates that agree with the default block, fastest first: (time of one launch in us, block)."""
    size = case.outputs * case.matrices * case.width * dtype.itemsize
    copies = int(max(2, min(LAUNCHES, WEIGHT_BYTES // size)))
    run = launcher(case, dtype, copies)
    expected = run(0, None).clone()
    measured = []
    for block in candidates(case):
        given = run(0, block)
        if case.kernel == "lm_head_argmax":
            agrees = torch.equal(given, expected)
        else:
            agrees = torch.allclose(given.float(), expected.float(), rtol=2e-2, atol=2e-2)
        if not agrees:
            raise AssertionError(f"{case}: {block} gives another result than the default block")
        launches = max(copies, LAUNCHES // copies * copies)

        def launch_all(block: Block = block, launches: int = launches) -> None:
            for i in range(launches):
                run(i % copies, block)

        time = time_us(launch_all)
        measured.append((time / launches, block))
    return sorted(measured)


def compile_all(found: list[Case], dtype: torch.dtype, workers: int) -> None:
    """Compiles every candidate into Triton's cache, in parallel: the search then only loads them."""
    jobs = [(case, block, dtype) for case in found for block in candidates(case)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(_compile, jobs, chunksize=4)


def _compile(case: Case, block: Block, dtype: torch.dtype) -> None:
    launcher(case, dtype, 1)(0, block)
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES), help=f"comma list of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--out", type=Path, help="the table (default: beside the kernels, named after the GPU)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: block shapes can only be searched on a GPU")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    path = args.out or Path(launch.__file__).parent / "blocks" / f"{name}.json"
    dtype = getattr(torch, args.dtype)
    found = sorted({case for model in args.models.split(",") for case in cases(ModelConfig.from_hf(SHAPES[model]))})
    compile_all(found, dtype, args.workers)
    table = json.loads(path.read_text()) if path.exists() else {"blocks": {}, "time_us": {}}
    for case in found:
        measured = search(case, dtype)
        time, block = measured[0]
        table["blocks"][case.key(args.dtype)] = list(block)
        table["time_us"][case.key(args.dtype)] = round(time, 2)
        size = case.outputs * case.matrices * case.width * dtype.itemsize
        default = next((t for t, b in measured if b == launch.default_block(*case[1:3], case.matrices)), None)
        print(f"{case.key(args.dtype)}: {time:.2f} us, {size / time / 1e3:.0f} GB/s, {block}, default {default}")
    table["gpu"], table["torch"], table["triton"] = torch.cuda.get_device_name(), torch.__version__, triton.__version__
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

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
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

import runtime.kernels as kernels
from runtime.bench.timing import time_us
from runtime.kernels.argmax import new_argmax_keys
from runtime.kernels.attention_splits import AttentionSplits
from runtime.kernels.block import Block, default_block
from runtime.kernels.ops import Ops, ops_for
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED

WEIGHT_BYTES = 600e6  # distinct weights in one timed graph, many times the L2
LAUNCHES = 40  # at least, in one timed graph
CUDA = torch.device("cuda")


class Case(NamedTuple):
    """One kernel at one shape."""

    kernel: str
    outputs: int
    width: int
    has_branch: bool
    head_dim: int

    @property
    def matrices(self) -> int:
        return 2 if self.kernel == "gated_mlp" else 1

    def bytes(self, dtype: torch.dtype) -> int:
        """The size of its weights."""
        return self.outputs * self.matrices * self.width * dtype.itemsize

    def copies(self, dtype: torch.dtype) -> int:
        """How many copies of the weights keep a timed run from finding them in the L2."""
        return int(max(2, min(LAUNCHES, WEIGHT_BYTES // self.bytes(dtype))))

    def key(self, dtype: str) -> str:
        """The name of this case in a block table."""
        return f"{self.kernel}:{self.outputs}x{self.width}:{dtype}"


def cases(config: ModelConfig) -> list[Case]:
    """The matrix-vector products of one model's decode step."""
    layer = config.layers[0]
    rest = (config.family != "gemma", layer.head_dim)
    return [
        Case("qkv_projection", sum(layer.qkv_widths), config.hidden, *rest),
        Case("output_projection", config.hidden, layer.qkv_widths[0], *rest),
        Case("gated_mlp", config.intermediate, config.hidden, *rest),
        Case("residual_linear", config.hidden, config.intermediate, *rest),
        Case("lm_head_argmax", config.vocab, config.hidden, *rest),
    ]


def candidates(case: Case) -> list[Block]:
    """Blocks that keep 16 to 128 weight elements in each thread."""
    columns = triton.next_power_of_2(case.width)
    rows = (4, 6, 8, 16) if case.kernel == "output_projection" else (1, 2, 4, 8, 16)
    blocks = [Block(count, columns, warps) for count in rows for warps in (2, 4, 8, 16)]
    return [block for block in blocks if 16 <= block.rows * columns * case.matrices // (32 * block.warps) <= 128]


def operation(
    case: Case, dtype: torch.dtype, copies: int, rows: int = 1, device: torch.device = CUDA
) -> Callable[[Ops, int, Block | None], torch.Tensor]:
    """A function that runs the case on a backend, on copy i of its random weights and with a block, and returns its
    output."""
    made: dict[str, Any] = {"dtype": dtype, "device": device}
    weights = torch.randn(copies, case.outputs * case.matrices, case.width, **made) * case.width**-0.5
    x, branch, residual_out = (torch.randn(rows, case.width, **made) for _ in range(3))
    norm = torch.randn(case.width, **made) * 0.1
    residual = None if case.has_branch else torch.randn(rows, case.outputs, **made)
    out = torch.full((rows, case.outputs), float("nan"), **made)
    token, keys = torch.zeros(rows, dtype=torch.int64, device=device), new_argmax_keys(rows, device)
    # A context of 128 tokens, for the projection that combines attention's splits.
    heads = max(1, case.width // case.head_dim)
    attention = AttentionSplits.allocate(rows, heads, case.head_dim, device)
    attention.stats.fill_(1.0)
    attention.partial.normal_()
    position = torch.full((rows,), 127, dtype=torch.int32, device=device)
    branched: dict[str, Any] = {"branch": branch, "branch_norm": norm} if case.has_branch else {}
    stored: dict[str, Any] = {"residual_out": residual_out} if case.has_branch else {}

    def run(ops: Ops, copy: int, block: Block | None) -> torch.Tensor:
        weight = weights[copy]
        if case.kernel == "qkv_projection":
            ops.qkv_projection(out, x, norm, weight, eps=1e-6, block=block, **branched, **stored)
        elif case.kernel == "gated_mlp":
            ops.gated_mlp(out, x, norm, weight, eps=1e-6, block=block, **branched, **stored)
        elif case.kernel == "output_projection":
            ops.output_projection(out, attention, position, weight, heads=heads, residual=residual, block=block)
        elif case.kernel == "residual_linear":
            ops.residual_linear(out, x, weight, residual=residual, block=block)
        else:
            ops.lm_head_argmax(token, x, norm, weight, eps=1e-6, argmax_keys=keys, block=block, **branched)
            return token
        return out

    return run


def search(case: Case, dtype: torch.dtype) -> list[tuple[float, Block]]:
    """All candidates that agree with the default block, fastest first: (time of one launch in us, block)."""
    copies = case.copies(dtype)
    run = partial(operation(case, dtype, copies), ops_for(CUDA))
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

        measured.append((time_us(launch_all, CUDA) / launches, block))
    return sorted(measured)


def compile_all(found: list[Case], dtype: torch.dtype, workers: int) -> None:
    """Compiles every candidate into Triton's cache, in parallel: the search then only loads them."""
    jobs = [(case, block, dtype) for case in found for block in candidates(case)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(_compile, jobs, chunksize=4)


def _compile(case: Case, block: Block, dtype: torch.dtype) -> None:
    operation(case, dtype, 1)(ops_for(CUDA), 0, block)
    torch.cuda.synchronize()


def write_table(
    found: list[Case], dtype: torch.dtype, path: Path, workers: int, deadline: float = float("inf")
) -> Iterator[str]:
    """Searches case after case and writes the table after each; one line is yielded for each.

    Args:
        found: what to search.
        dtype: of weights and activations.
        path: the table, kept where it lists other shapes.
        workers: processes that compile.
        deadline: no search begins after this reading of time.monotonic().
    """
    compile_all(found, dtype, workers)
    table = json.loads(path.read_text()) if path.exists() else {"blocks": {}, "time_us": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in found:
        if time.monotonic() > deadline:
            yield f"no time left for {case}"
            continue
        measured = search(case, dtype)
        best_us, block = measured[0]
        key = case.key(str(dtype).removeprefix("torch."))
        table["blocks"][key], table["time_us"][key] = list(block), round(best_us, 2)
        table["gpu"], table["torch"] = torch.cuda.get_device_name(), torch.__version__
        table["triton"] = triton.__version__
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        default = next((t for t, b in measured if b == default_block(*case[1:3], case.matrices)), None)
        yield f"{key}: {best_us:.2f} us, {case.bytes(dtype) / best_us / 1e3:.0f} GB/s, {block}, default {default}"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PUBLISHED), help=f"comma list of {', '.join(PUBLISHED)}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--out", type=Path, help="the table (default: beside the kernels, named after the GPU)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: block shapes can only be searched on a GPU")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    path = args.out or Path(kernels.__file__).parent / "blocks" / f"{name}.json"
    dtype = getattr(torch, args.dtype)
    found = sorted({case for model in args.models.split(",") for case in cases(ModelConfig.from_hf(PUBLISHED[model]))})
    for line in write_table(found, dtype, path, args.workers):
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

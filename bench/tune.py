"""Searches the forms and blocks of the products on the GPU at hand and writes kernels/blocks/<gpu>.json.

    python -m runtime.bench.tune [--models gemma-1.1-2b,gemma-3-270m] [--rows 1,8,64] [--dtype bfloat16]
                                 [--quantize int8,int4] [--kernels residual_linear] [--out FILE]
    python -m runtime.bench.tune --simulated h100 [--models ...] [--rows ...]       no GPU needed, writes nothing

Candidates are compiled in parallel, which needs no GPU. Each is checked against the default block's result, then timed
in a CUDA graph of launches over distinct copies of the weights, so that none is found in L2. The best median wins; a
row's sums depend on the block, so a new table means new last bits, and a new parity run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

import runtime.kernels as kernels
from runtime.bench.products import LAUNCHES, Case, cases, operation
from runtime.bench.timing import each, time_us
from runtime.cli.arguments import some_of
from runtime.cost.machine_code import programs, resources, source
from runtime.cost.plan import TARGETS, Target
from runtime.kernels.block import HELD_MAX_ROWS, ROW_CLASSES, Block, dot_block, sum_block
from runtime.kernels.launch import Gpu, Launch, gpu_of
from runtime.kernels.ops import RecordingOps, ops_for
from runtime.kernels.products import MIN_N
from runtime.kernels.triton_function import cdiv, next_power_of_2
from runtime.model.config import QUANTIZED_TO, ModelConfig
from runtime.model.published import PUBLISHED

# For loops: weight rows, columns of a slice, slices, stages. At 64 rows fewer fit.
LOOPS = {
    1: ((16,), (64, 128), (4,), (4,)),
    8: ((16, 32), (64, 128, 256), (2, 4, 8), (2, 3, 4, 8)),
    64: ((16, 32, 64), (32, 64, 128), (2, 4, 8), (2, 3, 4)),
}
# The same for int4, whose words hold 128 columns.
LOOPS_OF_INT4 = {
    1: ((16,), (128,), (1, 4), (4,)),
    8: ((16, 32, 64), (128, 256, 512), (1, 2, 4, 8), (2, 3, 4)),
    64: ((16, 32, 64), (128, 256), (1, 2, 4, 8), (1, 2, 3)),
}
SHARED_BYTES = 110 * 1024  # per program, two on a multiprocessor of sm_90; one alone may have twice as many
# Bytes that a thread of the sum form holds (integers: at least half of it): enough loads in flight, few enough
# registers.
LEAST_BYTES, MOST_BYTES = 64, 300
KERNELS = ("qkv_projection", "residual_linear", "gated_mlp", "lm_head_argmax")
CUDA = torch.device("cuda")


def default_block(case: Case, dtype: torch.dtype, max_rows: int) -> Block:
    """The block that a GPU without a table uses."""
    integers = case.integers or None
    if max_rows == 1 or dtype is torch.float32:
        return sum_block(case.outputs, case.width, dtype, case.matrices, integers)
    return dot_block(case.width, max_rows, is_normed=case.has_norm, integers=integers)


def has_one_wave(case: Case, block: Block, gpu: Gpu) -> bool:
    """Whether a loop has no more programs than the GPU has multiprocessors, so that each may use all of one."""
    return block.form == "loop" and cdiv(case.outputs * case.matrices, block.rows) <= gpu.multiprocessors


def candidates(case: Case, dtype: torch.dtype, max_rows: int, gpu: Gpu) -> list[Block]:
    """The default block, and others of every form that a model of `max_rows` rows can use."""
    found = [default_block(case, dtype, max_rows)]
    if max_rows == 1 or dtype is torch.float32:
        found += _sums(case, dtype)
    if dtype is not torch.float32:
        piece = case.width & -case.width
        if max_rows <= HELD_MAX_ROWS and case.width <= 2304 and case.integers != "int4":
            found += [
                Block("held", rows, piece, warps) for rows, warps in ((16, 4), (16, 8), (32, 8)) if piece >= 16 * warps
            ]
        found += _loops(case, dtype, max_rows, gpu)
    return list(dict.fromkeys(found))


def _sums(case: Case, dtype: torch.dtype) -> Iterator[Block]:
    width, of_weight = case.width, case.bytes_of_weight(dtype)
    least = LEAST_BYTES / 2 if case.integers else LEAST_BYTES
    whole = 1 << (width.bit_length() - 1)  # the largest power of two: the rest is a piece of its own
    for rows, columns in itertools.product((1, 2, 4, 8, 16), dict.fromkeys((whole, max(width & -width, 128)))):
        for warps in (1, 2, 4, 8, 16) if width > 4096 else (1, 2, 4, 8):
            held = rows * width * case.matrices * of_weight / (32 * warps)
            loads = rows * columns * of_weight / (32 * warps * 16)  # of 16 bytes, by each lane
            if least <= held <= MOST_BYTES and (loads >= 1 or warps <= 2) and width // columns <= 27:
                yield Block("sum", rows, columns, warps)


def _loops(case: Case, dtype: torch.dtype, max_rows: int, gpu: Gpu) -> Iterator[Block]:
    of_weight = case.bytes_of_weight(dtype)
    sizes = (LOOPS_OF_INT4 if case.integers == "int4" else LOOPS)[max_rows]
    for rows, columns, slices, stages in itertools.product(*sizes):
        shared = stages * slices * columns * (rows * of_weight + max(max_rows, MIN_N) * dtype.itemsize)
        block = Block("loop", rows, columns, slices, stages)
        most = (2 if has_one_wave(case, block, gpu) else 1) * SHARED_BYTES
        if slices * columns <= next_power_of_2(case.width) and shared <= most:
            yield block


def search(case: Case, dtype: torch.dtype, max_rows: int, blocks: list[Block]) -> list[tuple[float, Block]]:
    """All blocks that agree with the first, fastest first: (time of one launch in us, block). For 64 rows the time is
    the geometric mean of a launch's at 8 and at 64 rows."""
    copies, ops = case.copies(dtype), ops_for(CUDA, max_rows)
    launches = max(copies, LAUNCHES // copies * copies)
    counts = (8, 64) if max_rows == 64 else (max_rows,)
    runs = [operation(case, dtype, copies, rows, CUDA) for rows in counts]
    expected = runs[-1](ops, 0, blocks[0]).clone()
    measured = []
    for block in blocks:
        try:
            given = runs[-1](ops, 0, block)
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            print(f"{case}: {block} cannot be launched: {error}"[:200])
            continue
        if case.kernel == "lm_head_argmax":
            agrees = bool((given == expected).float().mean() > 0.9)  # near ties of random logits
        else:
            agrees = torch.allclose(given.float(), expected.float(), rtol=2e-2, atol=2e-2)
        if not agrees:
            raise AssertionError(f"{case}: {block} gives another result than {blocks[0]}")
        product = 1.0
        for run in runs:
            launch = partial(lambda run, block, number: run(ops, number % copies, block), run, block)
            product *= time_us(partial(each, launch, range(launches)), CUDA, repeats=5) / launches
        measured.append((product ** (1 / len(runs)), block))
    return sorted(measured)


def recorded(case: Case, dtype: torch.dtype, max_rows: int, rows: int, block: Block, gpu: Gpu) -> list[Launch]:
    """The launches of a case of so many rows, in a model of `max_rows`."""
    ops = RecordingOps(gpu, max_rows)
    operation(case, dtype, 1, rows, torch.device("meta"))(ops, 0, block)
    return ops.launches


def compiled(case: Case, dtype: torch.dtype, max_rows: int, block: Block, gpu: Gpu) -> str | None:
    """Compiles a candidate into Triton's cache, without a GPU. Returns why it is ruled out, if it is."""
    target, why = GPUTarget("cuda", gpu.capability, 32), None
    counts = (8, 64) if max_rows == 64 else (max_rows,)
    for launch in itertools.chain(*(recorded(case, dtype, max_rows, rows, block, gpu) for rows in counts)):
        code, options = source(launch, target)
        try:
            made = triton.compile(code, target=target, options=options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200]
        registers, stack, local = resources(made.asm["cubin"])
        fitting, limit = programs(gpu.capability, made.metadata.num_warps, registers, made.metadata.shared)
        if stack or local or fitting < (1 if has_one_wave(case, block, gpu) else 2):
            why = f"{fitting} programs a multiprocessor, by {limit}; {stack + local} bytes spilled"
    return why


def compile_all(
    jobs: list[tuple[Case, torch.dtype, int, Block]], gpu: Gpu, workers: int
) -> dict[tuple[Case, int], list[Block]]:
    """Compiles every candidate in parallel; returns those that a search can time, the default block first."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        refused = pool.starmap(compiled, [(*job, gpu) for job in jobs], chunksize=2)
    found: dict[tuple[Case, int], list[Block]] = {}
    for (case, _, max_rows, block), why in zip(jobs, refused, strict=True):
        if why is None:
            found.setdefault((case, max_rows), []).append(block)
    return found


def write_table(
    found: list[Case],
    dtype: torch.dtype,
    path: Path,
    workers: int,
    deadline: float = float("inf"),
    classes: tuple[int, ...] = ROW_CLASSES,
) -> Iterator[str]:
    """Searches case after case and writes the table after each; one line is yielded for each.

    Args:
        found: what to search.
        dtype: of weights and activations.
        path: the table, kept where it lists other shapes.
        workers: processes that compile.
        deadline: no search begins after this reading of time.monotonic().
        classes: the numbers of rows, of ROW_CLASSES.
    """
    gpu = gpu_of(CUDA)
    assert gpu is not None
    jobs = [
        (case, dtype, rows, block) for rows in classes for case in found for block in candidates(case, dtype, rows, gpu)
    ]
    began = time.monotonic()
    blocks = compile_all(jobs, gpu, workers)
    yield f"{len(jobs)} candidates compiled in {time.monotonic() - began:.0f} s"
    table = json.loads(path.read_text()) if path.exists() else {"blocks": {}, "time_us": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    for rows, case in itertools.product(classes, found):
        if time.monotonic() > deadline:
            yield f"no time left for {case}, {rows} rows"
            continue
        measured = search(case, dtype, rows, blocks[case, rows])
        best_us, block = measured[0]
        key = case.key(dtype, rows)
        table["blocks"][key] = list(block if block.stages > 1 else block[:4])
        table["time_us"][key] = round(best_us, 2)
        table["gpu"], table["torch"] = gpu.name, torch.__version__
        table["triton"] = triton.__version__
        text = json.dumps(table, sort_keys=True, indent=1)
        path.write_text(re.sub(r"\[\s+([^\]]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")
        default = next((round(us, 2) for us, b in measured if b == default_block(case, dtype, rows)), None)
        forms: dict[str, float] = {}
        for us, b in measured:
            forms.setdefault(b.form, round(us, 2))
        rate = case.bytes(dtype) / best_us / 1e3
        yield f"{key}: {best_us:.2f} us, {rate:.0f} GB/s, {tuple(block)}, default {default}, {forms}"


def simulated(found: list[Case], dtype: torch.dtype, target: Target, classes: tuple[int, ...]) -> Iterator[str]:
    """The candidates of each case by their simulated times, fastest first: leads for a search, not measurements.

    Args:
        found, dtype, classes: as `write_table`.
        target: a GPU that can be simulated.
    """
    from runtime.cost import prediction  # which needs numba

    fits = prediction.fits(target.bandwidth_gb_s, target.gpu.multiprocessors)
    for rows, case in itertools.product(classes, found):
        times = []
        for block in candidates(case, dtype, rows, target.gpu):
            if compiled(case, dtype, rows, block, target.gpu):
                continue
            launches, capability = recorded(case, dtype, rows, rows, block, target.gpu), target.gpu.capability
            simulated_us = (sum(prediction.simulated_us(launch, capability, 128, fits)) for launch in launches)
            times.append((round(sum(simulated_us) / len(fits), 2), *block))
        yield f"{case.key(dtype, rows)}, simulated us: " + ", ".join(map(str, sorted(times)[:6]))
    yield f"simulated is not measured: {prediction.ERROR}"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        type=some_of(PUBLISHED),
        default=",".join(PUBLISHED),
        help=f"comma list of {', '.join(PUBLISHED)}",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--quantize",
        type=some_of(QUANTIZED_TO),
        default=[""],
        help=f"comma list of {', '.join(QUANTIZED_TO)}: the products of models in these, not in --dtype",
    )
    parser.add_argument(
        "--kernels", type=some_of(KERNELS), default=KERNELS, help=f"comma list of {', '.join(KERNELS)} (all)"
    )
    parser.add_argument(
        "--rows",
        type=some_of(ROW_CLASSES),
        default=",".join(map(str, ROW_CLASSES)),
        help="comma list of the most rows of a model (%(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="no search begins after these")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--out", type=Path, help="the table (default: beside the kernels, named after the GPU)")
    parser.add_argument(
        "--simulated", choices=[name for name, target in TARGETS.items() if target.gpu.capability == 90]
    )
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    configs = [ModelConfig.from_hf(PUBLISHED[model]) for model in args.models]
    products = {case for config, to in itertools.product(configs, args.quantize) for case in cases(config, to)}
    found = sorted(case for case in products if case.kernel in args.kernels)
    classes = tuple(map(int, args.rows))
    if args.simulated:
        for line in simulated(found, dtype, TARGETS[args.simulated], classes):
            print(line, flush=True)
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA device: blocks can be measured on a GPU only (--simulated needs none)")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    path = args.out or Path(kernels.__file__).parent / "blocks" / f"{name}.json"
    deadline = time.monotonic() + 60 * args.minutes
    for line in write_table(found, dtype, path, args.workers, deadline, classes):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Compiles every kernel of a decode step, of one that checks guesses and of a prompt's chunk to a cubin, without a GPU,
and holds what came out to seven rules.

    python -m runtime.check.compiled [--models gemma-3-270m] [--archs 90] [--jobs 2] --out FILE
    python -m runtime.check.compiled --render FILE FILE ... --out bench/COMPILED.md

The launches are those of runtime.cost.launches, specialised as Triton's JIT would; they are compiled once, since a
kernel is the same program for every number of rows (tests/test_specialization.py). `make compiled` brings the committed
results and the table up to date, under both versions of Triton: what FILE has already is taken from there where neither
the kernel's code nor a rule has changed since. The rules:

    1. no spills: no stack and no local memory, but where a head draws for more than 8 rows
    2. weights, and the keys and values of attention, are loaded 16 bytes at once; where rows of integers end in a
       piece too short for that, 8
    3. with dependent launch weights are loaded ahead of the wait, but those of a loop over columns, and activations
       behind it, in PTX and in SASS; nothing waits inside a loop
    4. two programs or more fit a multiprocessor, but where a loop over columns has no more of them than there are
       multiprocessors, or FILLS_ALONE says otherwise
    5. qkv_projection lets the next kernel start only behind its own wait: attention reads ahead of its wait what the
       step before may still be writing
    6. tensor cores are used by one opcode, and a product of eight rows on them issues 80 instructions at most for 16
       bytes of weights, 100 where it also norms the rows or draws tokens; of int8 66 and of int4 122, or 90 and 120
       where rows have fewer than 2048 columns, but in the head
    7. no product of 16 bits is fused with a sum of 16 bits, since Hugging Face rounds between the two
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from runtime.check.assembly import (
    PTX_START,
    PTX_WAIT,
    SASS_START,
    SASS_WAIT,
    Load,
    fused_in_16_bits,
    ptx_loads,
    sass_loads,
    starts_next_early,
    waits_in_a_loop,
)
from runtime.check.compiled_table import INTEGERS, render, shape
from runtime.cost.launches import chunk_launches, guess_launches, step_launches
from runtime.cost.machine_code import disassembled, fingerprint, programs, resources, source
from runtime.cost.plan import TARGETS
from runtime.cost.sass import parse, trace
from runtime.engine.padded_chunk import BUCKETS
from runtime.kernels.block import HELD_MAX_ROWS, ROW_CLASSES
from runtime.kernels.launch import Gpu, Launch
from runtime.kernels.ops import RecordingOps
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED

# One GPU for each compute capability.
NAMED = ("a100", "rtx-3090", "rtx-4090", "h100", "b200", "rtx-5090")
GPUS = {TARGETS[name].gpu.capability: TARGETS[name].gpu for name in NAMED}


class Reads(NamedTuple):
    """Pointers of a kernel that it may read before the wait."""

    weights: tuple[str, ...] = ()  # by far the most bytes
    other: tuple[str, ...] = ()
    more_later: bool = False  # not all of the weights are loaded before the wait
    late: bool = False  # none of them is
    holds_next: bool = False  # until its own wait is over
    least_bytes: int = 16  # that a load of weights has


WEIGHTS = ("weight_ptr", "gate_up_ptr", "table_ptr")
SCALE = ("scale_ptr",)  # of weights that are integers
NORMS = (*SCALE, "norm_weight_ptr", "branch_norm_ptr")
HEADS = ("position_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr")
READS = {
    "qkv_projection_kernel": Reads(("weight_ptr",), NORMS, holds_next=True),
    "qkv_projection_dot_kernel": Reads(("weight_ptr",), SCALE, holds_next=True),
    "decode_attention_kernel": Reads(("k_cache_ptr", "v_cache_ptr"), HEADS, True),
    "group_attention_kernel": Reads(("k_cache_ptr", "v_cache_ptr"), HEADS, True),
    "combine_splits_kernel": Reads((), ("position_ptr",)),
    "store_keys_kernel": Reads(),
    "gated_mlp_kernel": Reads(("gate_up_ptr",), NORMS),
    "gated_mlp_dot_kernel": Reads(("gate_up_ptr",), SCALE),
    "residual_linear_kernel": Reads(("weight_ptr",), SCALE),
    "residual_linear_dot_kernel": Reads(("weight_ptr",), SCALE),
    "lm_head_kernel": Reads(("table_ptr",), NORMS),
    "lm_head_dot_kernel": Reads(("table_ptr",), SCALE),
    "pick_kernel": Reads(),
    "rms_norm_kernel": Reads((), ("weight_ptr",)),
    "residual_norm_kernel": Reads((), NORMS),
    "advance_kernel": Reads(),
    # Of a chunk of a prompt: they follow a library's kernels, and read nothing of a chunk before their wait.
    "rotate_heads_kernel": Reads(),
    "chunk_attention_kernel": Reads(("k_cache_ptr", "v_cache_ptr"), late=True),
    "store_chunk_kernel": Reads(),
    "gated_product_kernel": Reads(),
    "dequantize_kernel": Reads(),
}
# Kernels and blocks of which one program alone fits a multiprocessor, and where. A chunk's 32 queries of 256 dimensions
# and 32 keys and values take 51 KB of shared memory, and these GPUs have 100. Of 16 queries two programs would fit, and
# read every key twice as often.
FILLS_ALONE = {("chunk_attention_kernel", "32x32"): (86, 89, 120)}
# Models whose kernels are also compiled for integers with scales, by capability.
QUANTIZED = {80: ("gemma-3-270m",), 90: ("gemma-1.1-2b", "gemma-3-270m")}
QUANTIZE = ("int8", "int4")
# Of a thread, for each 16 bytes of weights that it multiplies on tensor cores; and where it draws tokens, or norms the
# rows too, which on an H200 is faster than a launch for it where matrices are the smallest.
MOST_INSTRUCTIONS, MOST_WITH_MORE = 80, 100
# For 16 bytes of integers but in the head: of rows of fewer columns than these, and of more. What an H200 took longest
# for is not what issues most: blocks that it was faster with issue up to 66 and 122, those of before 64 and 109.
MOST_OF_INTEGERS, MANY_COLUMNS = {"int8": (90, 66), "int4": (120, 122)}, 2048


def reads_of(launch: Launch) -> Reads:
    """The roles of a launch's pointers: a looped product loads weights behind the wait, attention of guesses keys."""
    reads, given = READS[launch.kernel.__name__], launch.arguments
    is_late = not given.get("IS_HELD", True) or given.get("IS_SEQUENCE", False)
    has_tail = given.get("scale_ptr") is not None and given["WIDTH"] & (given["WIDTH"] - 1) != 0
    return reads._replace(late=is_late or reads.late, least_bytes=8 if has_tail else 16)


def load_faults(reads: Reads, in_ptx: list[Load], in_sass: list[Load], waits: bool) -> list[str]:
    """What rules 2 and 3 have against a kernel's loads."""
    faults = []
    allowed = {*reads.other} if reads.late else {*reads.weights, *reads.other}
    ahead = {load.line for load in in_sass if load.early}
    for weight in reads.weights:
        loads = [load for load in in_ptx if load.pointer == weight]
        narrow = sorted({load.bytes for load in loads if load.bytes < reads.least_bytes})
        if narrow or not loads:
            faults.append(f"{weight} is loaded {narrow} bytes at once")
        early = [load for load in loads if load.early]
        # The compiler of SASS may have moved a load down.
        if waits and reads.late:
            continue
        if waits and not ((early if reads.more_later else early == loads) and {load.line for load in early} <= ahead):
            faults.append(f"{weight} is not loaded before the wait")
    wrong = sorted({str(load.pointer) for load in in_ptx if load.early and load.pointer not in allowed})
    # It may have moved one up, too: what is early in SASS must come from the lines of what may be.
    held_back = {load.line for load in in_ptx if load.pointer not in allowed}
    moved = ahead & held_back | ahead - {load.line for load in in_ptx if load.early}
    # A line of no load at all (sm_120: the start of the next kernel) names none; then the number tells.
    if sum(load.early for load in in_sass) <= sum(load.early for load in in_ptx):
        moved &= {load.line for load in in_ptx}
    wrong += sorted(f"{Path(file).name}:{line}" for file, line in moved)
    if wrong:
        faults.append(f"loaded before the wait: {', '.join(wrong)}")
    return faults


def inspect(launch: Launch, capability: int, reads: Reads | None = None) -> dict[str, Any]:
    """Compiles one launch and returns its row of the table, with "faults" where it breaks a rule.

    Args:
        launch: as `step_launches` records it.
        capability: a key of LIMITS.
        reads: the roles of its pointers; None for those of a decode step's kernel.
    """
    target = GPUTarget("cuda", capability, 32)
    code, options = source(launch, target)
    made = triton.compile(code, target=target, options=options)
    sass, (registers, stack, local) = disassembled(made.asm["cubin"], "-g", "-hex"), resources(made.asm["cubin"])
    pointers = [name if kind[0] == "*" else "" for name, kind in code.signature.items() if kind != "constexpr"]
    in_ptx, in_sass = ptx_loads(made.asm["ptx"], pointers), sass_loads(sass)
    name = launch.kernel.__name__
    reads = reads or reads_of(launch)
    count, limit = programs(capability, made.metadata.num_warps, registers, made.metadata.shared)
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    waits = PTX_WAIT in made.asm["ptx"]

    faults = load_faults(reads, in_ptx, in_sass, waits)
    # A head that draws for 64 rows has the noise of a whole tile to hold, behind its products: where there is a softcap
    # too, it spills some of that under Triton 3.6.
    may_spill = launch.arguments.get("HAS_SEED") and launch.arguments.get("N", 0) > 8
    if (stack or local or spills) and not may_spill:
        faults.append(f"spills: {stack} bytes of stack, {local} of local memory, {spills} instructions")
    sizes, block = shape(launch.arguments)
    one_wave = "SLICES" in launch.arguments and math.prod(launch.grid) <= GPUS[capability].multiprocessors
    if count < (1 if one_wave or capability in FILLS_ALONE.get((name, block), ()) else 2):
        faults.append(f"{count} programs a multiprocessor, by {limit}")
    found = {(PTX_WAIT in made.asm["ptx"], PTX_START in made.asm["ptx"]), (SASS_WAIT in sass, SASS_START in sass)}
    if found != {(launch.arguments["USE_DEPENDENT_LAUNCH"],) * 2}:
        faults.append("a wait or the start of the next kernel is missing, or is where there is no dependent launch")
    if reads.holds_next and starts_next_early(made.asm["ptx"], sass):
        faults.append("lets the next kernel start before its own wait")
    if waits and waits_in_a_loop(made.asm["ptx"], sass):
        faults.append("waits for the kernel before inside a loop")
    opcodes = sorted(set(re.findall(r"\b(\w*MMA\.\d+[\w.]*)", sass)))
    if len(opcodes) > 1:
        faults.append(f"{len(opcodes)} opcodes of tensor cores: {', '.join(opcodes)}")
    instructions = _instructions(launch, made.metadata.num_warps, sass)
    has_norm = launch.arguments.get("IS_HELD") and launch.arguments.get("norm_weight_ptr") is not None
    most = MOST_WITH_MORE if has_norm or launch.arguments.get("HAS_SEED") else MOST_INSTRUCTIONS
    if launch.arguments.get("scale_ptr") is not None and not name.startswith("lm_head"):
        of_few, of_many = MOST_OF_INTEGERS[INTEGERS[launch.arguments["scale_ptr"].dtype]]
        most = of_many if launch.arguments["WIDTH"] >= MANY_COLUMNS else of_few
    if "SLICES" in launch.arguments and launch.arguments["N"] == 8 and instructions > most:
        faults.append(f"{instructions} instructions for 16 bytes of weights")
    if fused := fused_in_16_bits(made.asm["ptx"]):
        faults.append(f"{len(fused)} products of 16 bits are fused with a sum, as in {fused[0]}")
    weight_bytes = sorted({load.bytes for load in in_ptx if load.pointer in reads.weights})
    return {
        "arch": capability,
        "kernel": name.removesuffix("_kernel"),
        "shape": sizes,
        "block": block,
        "warps": made.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "shared": made.metadata.shared,
        "weight_bytes": weight_bytes,
        "opcode": "".join(opcodes),
        "instructions": instructions,
        "programs": count,
        "limit": limit,
    } | ({"faults": faults} if faults else {})


def _instructions(launch: Launch, warps: int, text: str) -> int:
    """Instructions that a thread issues for each 16 bytes of weights of one row, or of all rows on tensor cores; 0
    where there are no weights."""
    arguments = launch.arguments
    block = arguments.get("BLOCK_OUTPUTS")
    if block is None:
        return 0
    passes = -(-arguments["WIDTH"] // (arguments["SLICES"] * arguments["BLOCK_WIDTH"])) if "SLICES" in arguments else 1
    matrices = 2 if launch.kernel.__name__ == "gated_mlp_kernel" else 1
    pieces = block * matrices * _row_bytes(launch) / 16 / (32 * warps)  # of a thread
    issued = len(trace(parse(text), passes))
    assert issued
    return round(issued / pieces)


def _row_bytes(launch: Launch) -> int:
    """Of one row of the weights that a product reads."""
    (weights,) = (tensor for name, tensor in launch.arguments.items() if name in WEIGHTS)
    return weights.shape[1] * weights.element_size()


def integer_launches(config: ModelConfig, gpu: Gpu) -> list[Launch]:
    """Those of decode steps of models of one row and of eight, and of a chunk of a prompt, that read integers with
    scales."""
    steps = [
        step_launches(config, "bfloat16", gpu, batch=rows, quantize=quantize)
        for quantize, rows in itertools.product(QUANTIZE, (1, HELD_MAX_ROWS))
    ]
    chunks = [chunk_launches(config, "bfloat16", gpu, BUCKETS[0], quantize=quantize) for quantize in QUANTIZE]
    return [launch for launch in itertools.chain(*steps, *chunks) if launch.arguments.get("scale_ptr") is not None]


def launches(config: ModelConfig, gpu: Gpu) -> list[Launch]:
    """Those in bfloat16 of decode steps of models of one row, of eight and of 64, greedy and drawn; of a step that
    checks guesses, of eight rows; of chunks of a prompt, in models of one row and of eight; and of the norm alone."""
    x, weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((1, config.hidden), (config.hidden,))
    )
    alone = RecordingOps(gpu)
    for residual in (None, x):
        alone.rms_norm(x, x, weight, residual=residual, eps=config.rms_norm_eps)
    steps = [
        step_launches(config, "bfloat16", gpu, batch=rows, samples=samples)
        for rows, samples in itertools.product(ROW_CLASSES, (False, True))
    ]
    guesses = guess_launches(config, "bfloat16", gpu, rows=HELD_MAX_ROWS)
    chunks = [
        chunk_launches(config, "bfloat16", gpu, seq, batch=rows)
        for seq, rows in [*((seq, 1) for seq in BUCKETS), (BUCKETS[0], HELD_MAX_ROWS)]
    ]
    return [*itertools.chain(*steps, guesses, *chunks), *alone.launches]


def _rules() -> str:
    """A hash of the modules that make a kernel's row and hold it to the rules."""
    files = {str(sys.modules[used.__module__].__file__) for used in (inspect, sass_loads, shape, source, trace)}
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(files))).hexdigest()


def table(models: list[str], capability: int, known: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The rows of all distinct launches of these models, those that read integers last.

    Args:
        models: keys of PUBLISHED.
        capability: a key of GPUS.
        known: rows of an earlier table. One that is of the same code by the same rules is not made anew.
    """
    rules, target = _rules(), GPUTarget("cuda", capability, 32)
    earlier = {row.get("code"): {name: row[name] for name in row if name != "models"} for row in known}
    quantized = [model for model in models if model in QUANTIZED.get(capability, ())]
    rows: dict[str, dict[str, Any]] = {}
    for record, model in (
        *((launches, model) for model in models),
        *((integer_launches, model) for model in quantized),
    ):
        for launch in record(ModelConfig.from_hf(PUBLISHED[model]), GPUS[capability]):
            code, options = source(launch, target)
            key = code.hash() + str(options)
            if key not in rows:
                made_of = hashlib.sha256((fingerprint(launch, target) + rules).encode()).hexdigest()[:16]
                rows[key] = {"models": [], "code": made_of} | (earlier.get(made_of) or inspect(launch, capability))
            if model not in rows[key]["models"]:
                rows[key]["models"].append(model)
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PUBLISHED), help=f"comma list of {', '.join(PUBLISHED)}")
    parser.add_argument("--archs", default=",".join(map(str, GPUS)), help="comma list of compute capabilities")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--render", type=Path, nargs="+", metavar="FILE", help="results to make the readable table of")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.render:
        results = [json.loads(path.read_text()) for path in args.render]
        args.out.write_text(render(results, [str(path) for path in args.render], str(args.out)))
        return 0
    known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    jobs = [(args.models.split(","), int(arch), known) for arch in args.archs.split(",")]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        rows = [row for rows in pool.starmap(table, jobs, chunksize=1) for row in rows]
    lines = ",\n".join(json.dumps(row) for row in rows)
    args.out.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    faulty = [row for row in rows if "faults" in row]
    for row in faulty:
        print(f"sm_{row['arch']} {row['kernel']} {row['shape']}: {'; '.join(row['faults'])}")
    print(f"{len(rows)} kernels, {len(faulty)} against the rules")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())

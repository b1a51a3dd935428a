"""What the predictor assumes about a GPU (runtime/cost/simulator.py), measured: the cost of a launch, and latencies.

Latencies come from chains of loads, each of which gives the address of the next, run by one warp: in a table that fits
L1, in one that fits L2, and in one that fits neither and is read once. The latency of a conversion comes from a chain
of conversions. All are in clocks of the multiprocessor, whose frequency is found by comparing its clock counter with
the GPU's timer.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from runtime.bench.timing import each, time_us
from runtime.kernels.launch import IN_INTERPRETER, current, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.triton_function import jit, tl

REPEATS = 5
LINE = 16  # int64 of 128 bytes: each load of a chain touches a line of its own
L1_BYTES, L2_BYTES, DRAM_BYTES = 64 << 10, 24 << 20, 4 << 30  # of the tables, on a GPU
LOADS = 4096
NODES = 93  # launches of a decode step of Gemma 1.1 2B
COPIED_BYTES = 4 << 30


@jit
def empty_kernel(out_ptr, USE_DEPENDENT_LAUNCH: tl.constexpr):
    # One program of a kernel that does nothing, to measure the cost of a launch.
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    tl.store(out_ptr + tl.program_id(0), 0)


def launch_costs(device: torch.device) -> dict[str, float]:
    """The bandwidth of copying, and the cost of an empty launch, one of NODES in a graph, with and without dependent
    launch where the GPU has it; on a CPU, in the interpreter, at toy size."""
    on_gpu = device.type == "cuda"
    buffer = torch.ones(COPIED_BYTES if on_gpu else 1 << 16, dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(buffer).copy_, buffer)
    result = {"copy_gb_s": 2 * buffer.nbytes / time_us(copy, device) / 1e3}
    programs, nodes = (132, NODES) if on_gpu else (2, 2)
    out = torch.empty(programs, dtype=torch.int32, device=device)
    for dependent in (False, True):
        if dependent and (not on_gpu or torch.cuda.get_device_capability(device)[0] < 9):
            continue
        options = {"launch_pdl": True} if dependent else {}
        empty = partial(empty_kernel[(programs,)], out, USE_DEPENDENT_LAUNCH=dependent, num_warps=4, **options)
        name = "empty_dependent_launch_us" if dependent else "empty_launch_us"
        result[name] = time_us(partial(each, lambda _, empty=empty: empty(), range(nodes)), device) / nodes
    return result


@jit
def clock():
    """The multiprocessor's clock counter; 0 in the interpreter."""
    if IN_INTERPRETER:
        return tl.full([], 0, tl.int64)
    else:
        return tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@jit
def nanoseconds():
    """The GPU's timer; 0 in the interpreter."""
    if IN_INTERPRETER:
        return tl.full([], 0, tl.int64)
    else:
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@jit(do_not_specialize=["untimed", "loads"])
def chase_kernel(out_ptr, next_ptr, untimed, loads, CACHE: tl.constexpr):
    # One program follows a chain of places and stores where it ends, its clocks and its nanoseconds.
    place = tl.full([], 0, tl.int64)
    for _ in range(untimed):
        place = tl.load(next_ptr + place, cache_modifier=CACHE)
    # The bound depends on the last load, though its value does not: the timed loop begins when the untimed one is done.
    loads += tl.minimum(place, 0).to(tl.int32)
    began, began_ns = clock(), nanoseconds()
    for _ in range(loads):
        place = tl.load(next_ptr + place, cache_modifier=CACHE)
    tl.store(out_ptr + 3 * tl.program_id(0), place)
    tl.store(out_ptr + 3 * tl.program_id(0) + 1, clock() - began)
    tl.store(out_ptr + 3 * tl.program_id(0) + 2, nanoseconds() - began_ns)


@jit(do_not_specialize=["conversions"])
def convert_kernel(out_ptr, x_ptr, conversions):
    # One program rounds a sum to bf16 and widens it, again and again.
    x = tl.load(x_ptr)
    began = clock()
    for _ in range(conversions):
        x = (x + 1.0).to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr, x.to(tl.int64))
    tl.store(out_ptr + 1, clock() - began)


def chain(size: int, device: torch.device) -> torch.Tensor:
    """A table of `size` bytes, in which the first word of every line is the index of another line's: one cycle through
    all lines in random order."""
    lines = max(2, size // (8 * LINE))
    order = torch.randperm(lines, device=device) * LINE
    table = torch.zeros(lines * LINE, dtype=torch.int64, device=device)
    table[order] = order.roll(-1)
    return table


def constants(device: torch.device) -> dict[str, Any]:
    """Latencies in clocks and the clock's frequency, medians of REPEATS runs. On a CPU, in the interpreter, they are 0,
    from tables of toy size."""
    on_gpu = device.type == "cuda"
    loads = LOADS if on_gpu else 8
    out = torch.zeros(3 * 1024, dtype=torch.int64, device=device)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 2
    found: dict[str, Any] = {"loads": loads}

    def clocks(size: int, cache: str, untimed: int, programs: int = 1) -> list[float]:
        table, measured = chain(size if on_gpu else 512, device), []
        for _ in range(REPEATS if untimed else 1):  # a table that is read once is in no cache
            chase_kernel[(programs,)](out, table, untimed if on_gpu else 2, loads, CACHE=cache, num_warps=1)
            measured.append(max(out[1 : 3 * programs : 3].tolist()) / loads)
        return measured

    with current(device):
        chains = {
            "l1": (L1_BYTES, ".ca", 1024, 1),
            "l2": (L2_BYTES, ".cg", L2_BYTES // (8 * LINE), 1),
            "l2, every multiprocessor in the same order": (L1_BYTES, ".cg", 1024, multiprocessors),
            "dram": (DRAM_BYTES, ".cg", 0, 1),
        }
        found["clocks"] = {name: statistics.median(clocks(*arguments)) for name, arguments in chains.items()}
        convert_kernel[(1,)](out, torch.ones(1, device=device), loads, num_warps=1)
        found["clocks"]["rounding a sum to bf16 and widening it"] = float(out[1]) / loads
        chase_kernel[(1,)](out, chain(L1_BYTES if on_gpu else 512, device), 0, 64 * loads, CACHE=".ca", num_warps=1)
        found["clock_ghz"] = float(out[1]) / max(1, int(out[2]))
    return found

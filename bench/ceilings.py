"""The best bandwidth and launch cost that a machine reaches, and which machine it is."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from typing import Any

import torch
import transformers
import triton
import triton.language as tl

from runtime.bench.commit import commit
from runtime.bench.timing import each, time_us
from runtime.kernels.block import table_hash
from runtime.kernels.launch import INTERPRETING, gpu_of, let_next_kernel_start, wait_for_previous_kernel

NODES = 93  # launches of a decode step of Gemma 1.1 2B


@triton.jit
def read_kernel(out_ptr, x_ptr, elements, BLOCK: tl.constexpr):
    # One program reads one contiguous slice and stores one word, so that the compiler cannot drop the loads.
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, elements, BLOCK):
        total ^= tl.load(x_ptr + program.to(tl.int64) * elements + offset + tl.arange(0, BLOCK))
    tl.store(out_ptr + program, tl.max(total, axis=0))


@triton.jit
def empty_kernel(out_ptr, USE_DEPENDENT_LAUNCH: tl.constexpr):
    # One program of a kernel that does nothing, to measure the cost of a launch.
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    tl.store(out_ptr + tl.program_id(0), 0)


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    gpu = gpu_of(torch.device("cuda")) if torch.cuda.is_available() else None
    return {
        "gpu": gpu.name if gpu else None,
        "multiprocessors": gpu.multiprocessors if gpu else None,
        "block_table_sha256": table_hash(gpu),
        "nvidia_smi": _output(
            "nvidia-smi",
            "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit",
            "--format=csv",
        ),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "interpreted": INTERPRETING,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def ceilings(device: torch.device, elements: int) -> dict[str, float]:
    """Read and copy bandwidth on a buffer of `elements` int32, and the cost of an empty launch, one of NODES in a
    graph, with and without dependent launch where the GPU has it."""
    buffer = torch.randint(0, 1 << 30, (elements,), device=device, dtype=torch.int32)
    out = torch.empty(1 << 16, device=device, dtype=torch.int32)
    reads = []
    for programs, block in ((1056, 2048), (4096, 4096), (16384, 8192)) if device.type == "cuda" else ((4, 2048),):
        slice_elements = elements // programs // block * block
        launch = partial(read_kernel[(programs,)], out, buffer, slice_elements, BLOCK=block, num_warps=4)
        reads.append(slice_elements * programs * 4 / time_us(launch, device) / 1e3)
    other = torch.empty_like(buffer)
    copied = elements * 8 / time_us(partial(other.copy_, buffer), device) / 1e3
    result = {"read_gb_s": max(reads), "copy_gb_s": copied}
    programs, nodes = (132, NODES) if device.type == "cuda" else (2, 2)
    for dependent in (False, True):
        options = {"launch_pdl": True} if dependent else {}
        if dependent and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9):
            continue
        empty = partial(empty_kernel[(programs,)], out, USE_DEPENDENT_LAUNCH=dependent, num_warps=4, **options)
        name = "empty_dependent_launch_us" if dependent else "empty_launch_us"
        result[name] = time_us(partial(each, lambda _, empty=empty: empty(), range(nodes)), device) / nodes
    return result

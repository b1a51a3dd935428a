"""The machine, the versions and the ceiling that a benchmark's numbers depend on."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from runtime.bench.records import Environment
from runtime.cost.bandwidth import definition
from runtime.cost.info import cpu_name, installed_versions
from runtime.kernels.block import table_hash
from runtime.kernels.launch import INTERPRETING, gpu_of
from runtime.model.threads import available_threads

# Memory bandwidth from the datasheets, by a substring of the driver's device name; the first match counts.
DATASHEET_GB_S: dict[str, float] = {
    "H100 PCIe": 2000,
    "H100 NVL": 3900,
    "H100": 3350,
    "H200": 4800,
    "B200": 8000,
    "A100-SXM4-80GB": 2039,
    "RTX 3090": 936,
    "RTX 4090": 1008,
    "RTX 5090": 1792,
}


def environment(device: torch.device) -> Environment:
    """What the numbers of a run on this device depend on; the load average is taken before the run."""
    on_gpu = device.type == "cuda"
    gpu = gpu_of(device)
    clock, driver = _gpu_clock_and_driver(device) if on_gpu else (_cpu_clock(), None)
    return Environment(
        device=str(device),
        device_name=gpu.name if gpu else cpu_name(),
        multiprocessors=gpu.multiprocessors if gpu else None,
        block_table_sha256=table_hash(gpu),
        cores=len(os.sched_getaffinity(0)),
        threads=available_threads(),
        clocks_mhz=clock,
        driver=driver,
        datasheet_gb_s=datasheet_gb_s(device),
        read_bandwidth=definition(device),
        load_average=os.getloadavg()[0],
        versions={**installed_versions(), "cuda": torch.version.cuda},
        commit=commit(),
    )


def machine(device: torch.device) -> dict[str, Any]:
    """The environment, flat, as the head of a GPU campaign's files, with all of the GPU's clocks and the time."""
    found = environment(device)
    clocks = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    return {
        "gpu": found.device_name if device.type == "cuda" else None,
        **found.flat(),
        "nvidia_smi": _output("nvidia-smi", f"--query-gpu={clocks}", "--format=csv"),
        **({"read_bandwidth": "a Triton kernel in the interpreter, which says nothing"} if INTERPRETING else {}),
        "interpreted": INTERPRETING,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str | None:
    """The commit of the sources, "+changes" where they differ from it; None outside a git checkout."""
    described = ("git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*")
    return _output(*described, folder=Path(__file__).parent)


def _output(*command: str, folder: Path | None = None) -> str | None:
    """What a command prints; None if it fails."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def datasheet_gb_s(device: torch.device) -> float | None:
    """The memory bandwidth in a GPU's datasheet; None for a GPU that is not listed and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for substring, rate in DATASHEET_GB_S.items() if substring in name), None)


def _gpu_clock_and_driver(device: torch.device) -> tuple[float | None, str | None]:
    query = ("nvidia-smi", f"--id={device.index or 0}", "--query-gpu=clocks.sm,driver_version", "--format=csv,noheader")
    try:
        clock, driver = (_output(*query) or "").split(", ")
        return float(clock.removesuffix(" MHz")), driver
    except ValueError:
        return None, None


def _cpu_clock(cpuinfo: Path = Path("/proc/cpuinfo")) -> float | None:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return statistics.fmean(found) if found else None

"""The machine, the versions and the ceiling that a benchmark's numbers depend on."""

from __future__ import annotations

import os
import statistics
import subprocess
from pathlib import Path

import torch

from runtime.bench.commit import commit
from runtime.bench.records import Environment
from runtime.cost.bandwidth import definition
from runtime.cost.info import cpu_name, installed_versions
from runtime.kernels.block import table_hash
from runtime.kernels.launch import gpu_of
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


def datasheet_gb_s(device: torch.device) -> float | None:
    """The memory bandwidth in a GPU's datasheet; None for a GPU that is not listed and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for substring, rate in DATASHEET_GB_S.items() if substring in name), None)


def _gpu_clock_and_driver(device: torch.device) -> tuple[float | None, str | None]:
    query = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=clocks.sm,driver_version", "--format=csv,noheader"]
    try:
        clock, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        return float(clock.removesuffix(" MHz")), driver
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None, None


def _cpu_clock(cpuinfo: Path = Path("/proc/cpuinfo")) -> float | None:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return statistics.fmean(found) if found else None

"""How many CPU threads a model computes with: the caller's number, or as many as this process can keep busy."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from runtime.model.config import MAX_THREADS


def resolve_threads(threads: int | str | None) -> int:
    """A number of threads: None and "auto" mean `available_threads()`; RuntimeConfig checks a number."""
    return available_threads() if threads is None or threads == "auto" else threads  # type: ignore[return-value]


def available_threads() -> int:
    """As many as PyTorch would use (one per physical core, or as OMP_NUM_THREADS and torch.set_num_threads say), but no
    more than the process's CPU affinity and its container's CPU quota, rounded up, allow."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    limits = [torch.get_num_threads(), allowed, MAX_THREADS, *([] if quota is None else [math.ceil(quota)])]
    return max(1, min(limits))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The container's CPU quota in cores: the smallest of its cgroup and the enclosing ones, version 1 or 2. None where
    there is none or it is unknown.

    Args:
        root: where cgroups are mounted.
        own: the file that lists this process's cgroups, one "number:controllers:/path" a line.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    quotas = [_quota(root)]  # a container often sees its own cgroup as the root
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers or "cpu" in controllers.split(","):
            mounts = [root] if not controllers else [root / "cpu", root / controllers]
            cgroup = Path(path.lstrip("/"))
            quotas += [_quota(mount / folder) for mount in mounts for folder in (cgroup, *cgroup.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    """One cgroup's quota in cores."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # absent, or "max"
        return None
    return cores if cores > 0 else None  # version 1 writes -1 for no quota


_process = SimpleNamespace(forked=False)


def _in_child() -> None:
    """Makes a forked child compute on one thread, with the same bits: PyTorch's pool does not survive a fork, and using
    it would hang. Decoding starts new threads of its own."""
    torch.set_num_threads(1)
    _process.forked = True


@functools.cache
def let_children_compute() -> None:
    """Lets processes that are forked from now on compute."""
    os.register_at_fork(after_in_child=_in_child)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Sets PyTorch's number of threads for the current Python thread, and restores the caller's afterwards. Always one
    in a forked child."""
    before = torch.get_num_threads()
    threads = 1 if _process.forked else threads
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

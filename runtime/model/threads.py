"""How many threads a model computes with on a CPU: the caller's number, or as many as this process may keep busy."""

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
    """A number of threads by itself: None and "auto" are as many as this process may keep busy; a number is left to
    RuntimeConfig to check."""
    return available_threads() if threads is None or threads == "auto" else threads  # type: ignore[return-value]


def available_threads() -> int:
    """As many as PyTorch would use (one a physical core; OMP_NUM_THREADS and torch.set_num_threads have their say), but
    no more than the process's affinity and its container's CPU quota allow. A part of a core counts as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    limits = [torch.get_num_threads(), allowed, MAX_THREADS, *([] if quota is None else [math.ceil(quota)])]
    return max(1, min(limits))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many cores' time the container may use: the least quota of its cgroup and those around it, of either version.
    None where there is no quota or it cannot be told.

    Args:
        root: where cgroups are mounted.
        own: the file that names this process's cgroups, a line "number:controllers:/path" for each.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    quotas = [_quota(root)]  # a container often sees its own cgroup as the root
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers or "cpu" in controllers.split(","):
            mounts = [root] if not controllers else [root / "cpu", root / controllers]
            inside = Path(path.lstrip("/"))
            quotas += [_quota(mount / around) for mount in mounts for around in (inside, *inside.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    """One cgroup's quota in cores."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
        return None
    return cores if cores > 0 else None  # version 1 says -1 where there is none


_process = SimpleNamespace(forked=False)


def _in_child() -> None:
    """What a forked child does first: PyTorch's threads have not come along, and it would wait for them for ever. So it
    computes on one, with the same bits; decoding makes threads of its own anew."""
    torch.set_num_threads(1)
    _process.forked = True


@functools.cache
def let_children_compute() -> None:
    """Makes processes forked from now on able to compute, those that leave Python's own fork."""
    os.register_at_fork(after_in_child=_in_child)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Lets PyTorch use so many threads for what this Python thread runs inside, and puts the caller's number back. In a
    forked child it is one whatever is asked for."""
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

"""Weights on a CPU lie in one allocation, in huge pages where the system gives them, and leave memory with it."""

from __future__ import annotations

import mmap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.model import huge_pages
from runtime.model.huge_pages import ALIGNMENT, HUGE_PAGE, Slab

CPU = torch.device("cpu")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def kilobytes(field: str) -> int:
    """What this process holds, from the kernel."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system gives no huge pages to who asks"
)
def test_memory_comes_in_huge_pages_and_goes_again() -> None:
    before, resident = kilobytes("AnonHugePages"), kilobytes("Rss")
    room = huge_pages.zeros(64 * HUGE_PAGE + 5, CPU).fill_(1)
    assert room.data_ptr() % HUGE_PAGE == 0
    assert kilobytes("AnonHugePages") - before >= 63 * HUGE_PAGE // 1024
    view = room.view(torch.uint8)[7:]
    del room
    assert int(view.sum()) == len(view)  # a view keeps it
    del view
    assert kilobytes("Rss") - resident < 16 * HUGE_PAGE // 1024


def test_tensors_of_a_slab_do_not_overlap() -> None:
    shapes: list[tuple[int, ...]] = [(3, 5), (7,), (), (130, 2)]
    slab = Slab(shapes, torch.bfloat16, CPU)
    tensors = [slab.take(shape).fill_(number) for number, shape in enumerate(shapes)]
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert (tensor == number).all()


@pytest.mark.parametrize("at_once", [1 << 30, HUGE_PAGE], ids=["at once", "in steps"])
def test_memory_is_there_before_its_first_use(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_CLEARED_AT_ONCE", at_once)
    slab, resident = Slab([(32 * HUGE_PAGE,)], torch.uint8, CPU), kilobytes("Rss")
    with slab.cleared_meanwhile():
        deadline = time.monotonic() + 30
        while kilobytes("Rss") - resident < 31 * HUGE_PAGE // 1024 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.monotonic() < deadline
    assert not slab.memory.any()
    with pytest.raises(KeyError), Slab([(0,)], torch.uint8, CPU).cleared_meanwhile():
        raise KeyError
    with Slab([(8,)], torch.uint8, torch.device("meta")).cleared_meanwhile():
        pass  # another device's own allocator clears nothing


def test_without_a_thread_memory_is_cleared_on_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse_thread)
    slab = Slab([(1000,)], torch.uint8, CPU)
    with slab.cleared_meanwhile():
        pass
    assert not slab.memory.any()


def refuse(*_: Any) -> None:
    raise OSError("no such advice")


@pytest.mark.parametrize("without", ["the advice", "a kernel that takes it"])
def test_other_systems_get_plain_memory(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if without == "the advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(huge_pages.mmap, "mmap", type("mmap", (mmap.mmap,), {"madvise": refuse}))
    room = huge_pages.zeros(1000, CPU)
    assert room.shape == (1000,)
    assert room.fill_(3).sum() == 3000


def test_other_devices_get_their_own_memory() -> None:
    assert huge_pages.zeros(10, torch.device("meta")).device.type == "meta"

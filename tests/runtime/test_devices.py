"""A model on the second GPU while the first is current: launches, captures and readings of time go to the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.bench.environment import environment as bench_environment
from runtime.cost import bandwidth
from runtime.engine import graph as graph_module
from runtime.engine.graph import CapturedGraph
from runtime.engine.readback import PinnedReadback
from runtime.kernels import block
from runtime.kernels import launch as module
from runtime.kernels.block import table_hash
from runtime.kernels.launch import Gpu, Launcher, gpu_of
from runtime.parity.environment import environment as audit_environment

SECOND = torch.device("cuda:1")


class Gpus:
    """Two GPUs of which one is current, and what was asked of each."""

    def __init__(self) -> None:
        self.current = 0
        self.seen: list[tuple[str, int]] = []
        self.streams: list[Any] = []  # of captures

    def exchange(self, index: int) -> int:
        before = self.current
        self.current = index if index >= 0 else before
        return before

    def see(self, what: str) -> None:
        self.seen.append((what, self.current))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Stands in for CUDA where the current device is set and where it counts."""
    gpus = Gpus()

    class Stream:
        def __init__(self, device: torch.device | None = None) -> None:
            self.index = gpus.current if device is None else device.index

        def wait_stream(self, other: int) -> None:
            gpus.seen.append(("wait", other))

    class Event:
        def __init__(self, enable_timing: bool = False) -> None: ...
        def record(self) -> None:
            gpus.see("event")

        def synchronize(self) -> None: ...
        def elapsed_time(self, other: Event) -> float:
            return 1.0

    @contextmanager
    def graph(graph: object, pool: object = None, stream: Stream | None = None) -> Iterator[None]:
        assert stream is not None and stream.index == gpus.current
        gpus.streams.append(stream)
        gpus.see("capture")
        yield

    @contextmanager
    def stream_made_current(stream: Stream) -> Iterator[None]:
        before = gpus.exchange(stream.index)
        yield
        gpus.exchange(before)

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, gpus.exchange)

    class CUDAGraph:
        def pool(self) -> object: ...
        def replay(self) -> None: ...

    for name, stand_in in (("Stream", Stream), ("Event", Event), ("graph", graph), ("CUDAGraph", CUDAGraph)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", stream_made_current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device.index)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus.current)
    monkeypatch.setattr(module, "_cuda_gpu", lambda index: Gpu(f"GPU {index}", 90 if index else 80, 132))
    graph_module._capture_stream.cache_clear()
    yield gpus
    graph_module._capture_stream.cache_clear()


class Kernel:
    """A compiled kernel that runs on whichever GPU is current, as Triton's do."""

    arg_names = ("USE_DEPENDENT_LAUNCH",)

    def __init__(self, gpus: Gpus, fails: bool = False) -> None:
        self.gpus, self.fails = gpus, fails
        self.options: dict[str, Any] = {}

    @property
    def made(self) -> Kernel:
        return self

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.gpus.see("launch")
            self.options = options
            if self.fails:
                raise RuntimeError("out of resources")

        return run


def launch(kernel: Kernel, device: torch.device) -> None:
    Launcher(gpu_of(device))(kernel, SimpleNamespace(device=device), (1,), 4)


def test_a_launch_goes_to_the_gpu_of_its_tensors(gpus):
    kernel = Kernel(gpus)
    for device in (SECOND, torch.device("cuda:0"), torch.device("cpu"), SECOND):
        launch(kernel, device)
    assert gpus.seen == [("launch", 1), ("launch", 0), ("launch", 0), ("launch", 1)]
    assert gpus.current == 0 and kernel.options["USE_DEPENDENT_LAUNCH"]


def test_a_failed_launch_leaves_the_current_gpu_as_it_was(gpus):
    with pytest.raises(RuntimeError, match="out of resources"):
        launch(Kernel(gpus, fails=True), SECOND)
    assert gpus.seen == [("launch", 1)] and gpus.current == 0


def test_blocks_are_those_of_the_gpu_that_runs_them(gpus):
    assert gpu_of(SECOND).name == "GPU 1" and gpu_of(torch.device("cuda:0")).name == "GPU 0"
    gpus.current = 1
    assert gpu_of(torch.device("cuda")).name == "GPU 1"  # the current one, as everywhere in PyTorch


def test_graphs_are_captured_on_the_gpu_of_the_model(gpus):
    for index in (0, 1):  # the first capture of a process must not settle where later ones go
        model = SimpleNamespace(device=torch.device("cuda", index), runtime=SimpleNamespace(threads=1, max_batch=1))
        for _ in range(2):
            CapturedGraph(model).capture(lambda ops: gpus.see("operations"))
        assert gpus.seen == [("capture", index), ("operations", index)] * 2 and gpus.current == 0
        gpus.seen.clear()
    assert gpus.streams[0] is gpus.streams[1] and gpus.streams[2] is gpus.streams[3], "or a pool would not be shared"


def test_time_is_taken_on_the_gpu_that_is_timed(gpus):
    assert bandwidth.device_seconds(lambda: gpus.see("run"), SECOND) == 1e-3
    assert gpus.seen == [("event", 1), ("run", 1), ("event", 1)] and gpus.current == 0


def test_tokens_come_back_over_a_stream_of_their_gpu(gpus, monkeypatch):
    honest = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: honest(*shape, **options))
    readback = PinnedReadback(SECOND, 2, 2, 4)
    readback.request([torch.tensor([3, 13]), torch.tensor([0, 10])])
    assert readback.take() == [[3, 13], [0, 10]]
    assert gpus.seen == [("wait", 1), ("event", 1)] and gpus.current == 0


H100 = Gpu("NVIDIA H100 80GB HBM3", 90, 132)


def test_artefacts_name_what_the_order_of_sums_depends_on(gpus, small_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_cuda_gpu", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100.name)
    monkeypatch.setattr("runtime.parity.environment.gpu_of", lambda device: H100)
    benchmark = bench_environment(SECOND).model_dump()
    audit = audit_environment(small_pair("gemma3").ours, tmp_path, [], "hf")
    for artefact in (benchmark, audit):
        assert artefact["device_name"] == H100.name and artefact["multiprocessors"] == 132
        assert artefact["block_table_sha256"] == table_hash(H100) is not None


def test_another_block_is_another_hash_and_no_table_is_none(monkeypatch):
    before = table_hash(H100)
    changed = {**block._block_table(H100.name), "qkv_projection:1x1:bfloat16:1": ["sum", 1, 1, 4]}
    monkeypatch.setattr(block, "_block_table", lambda name: changed)
    assert table_hash(H100) != before
    monkeypatch.undo()
    assert table_hash(H100) == before
    assert table_hash(Gpu("NVIDIA B200", 100, 148)) is None and table_hash(None) is None

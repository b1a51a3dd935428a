"""The ceiling that speeds are held against."""

from __future__ import annotations

import pytest
import torch

from runtime.cost import bandwidth
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.launch import INTERPRETING

CPU = torch.device("cpu")


@pytest.mark.parametrize("missing", [None, "numba is not here"])
def test_the_best_of_all_readings_counts(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing is None and cpu_calls.missing(torch.float32):
        pytest.skip("no compiled kernels here")
    monkeypatch.setattr(cpu_calls, "missing", lambda dtype: missing)
    times = iter([4.0, 2.0, 3.0, 0.5, 6.0, 7.0])
    runs = []
    monkeypatch.setattr(bandwidth, "device_seconds", lambda run, device: (runs.append(run), next(times))[1])
    given = bandwidth.read_bandwidth_gb_s(CPU, buffer_bytes=2**20, repeat=3)
    assert given == pytest.approx(2**20 / 1e9 / (2.0 if missing else 0.5))
    assert len(runs) == (3 if missing else 6)


@pytest.mark.skipif(not INTERPRETING, reason="runs Triton's kernel: in the interpreter, see test_interpreter.py")
def test_the_kernel_reads_every_word_once() -> None:
    words = torch.randint(0, 1 << 30, (4 * 4096,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for programs, block in ((4, 2048), (8, 512)):
        ((size, launch),) = bandwidth.gpu_readers(words.view(torch.float32), ((programs, block),))
        launch()
        out = launch.args[0]  # type: ignore[attr-defined]
        expected = words.view(programs, -1, block)[:, 0]
        for piece in words.view(programs, -1, block)[:, 1:].unbind(1):
            expected = expected ^ piece
        assert size == words.nbytes
        assert torch.equal(out, expected.amax(1))

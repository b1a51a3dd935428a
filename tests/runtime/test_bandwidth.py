"""The ceiling that speeds are held against."""

from __future__ import annotations

import pytest
import torch

from runtime.cost import bandwidth
from runtime.kernels.cpu import calls as cpu_calls

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

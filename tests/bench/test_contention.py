"""Busy processes run while engines are compared, and no longer."""

import pytest

from runtime.bench import contention

pytestmark = pytest.mark.newest_only  # about code of our own


def test_a_comparison_runs_beside_busy_processes(monkeypatch):
    honest, running = contention.subprocess.Popen, []

    def start(*arguments):
        running.append(honest(*arguments))
        return running[-1]

    def compare(arguments):
        assert arguments == ["compare", "--repeat", "3"]
        assert len(running) == 2 and all(process.poll() is None for process in running)
        raise ValueError("as if")

    monkeypatch.setattr(contention.subprocess, "Popen", start)
    monkeypatch.setattr(contention.command, "main", compare)
    with pytest.raises(ValueError, match="as if"):
        contention.main(["--busy", "2", "--repeat", "3"])
    assert all(process.poll() is not None for process in running)

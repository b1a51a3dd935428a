"""A share of the read bandwidth is of the reading directly before a run, whatever the machine does between rounds."""

import time
from types import SimpleNamespace

import pytest

from runtime.bench import compare, operations, rows, sweep
from runtime.bench.measure import ceiling_figures
from runtime.bench.records import Audit, Report
from runtime.cli import main as cli
from runtime.engine import decode

pytestmark = pytest.mark.newest_only

ROUNDS = 4
STEP_BYTES = 1e9  # that a step of the fake machine reads


@pytest.fixture
def machine(monkeypatch, read_gb_s):
    """A machine whose bandwidth halves at the third reading, from 40 to 20 GB/s, with the clock of its steps."""
    found = SimpleNamespace(now=0.0, readings=[])

    def reading():
        found.readings.append(40.0 if len(found.readings) < 2 else 20.0)
        return found.readings[-1]

    found.step_s = lambda: STEP_BYTES / 1e9 / (found.readings or [40.0])[-1]
    steppers = decode.stepper

    def stepper(*arguments):
        step = steppers(*arguments)

        def timed():
            found.now += found.step_s()
            step()

        return timed

    def clock():
        found.now += 1e-12  # prefill takes no time, but rates are over it
        return found.now

    read_gb_s(reading)
    monkeypatch.setattr(decode, "stepper", stepper)
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(operations, "device_seconds", lambda run, device: found.step_s())
    for module in (sweep, rows, operations):
        monkeypatch.setattr(module, "audit", lambda model: Audit(passed=True, verdict="passed: as if"))
    monkeypatch.setattr(sweep, "step_parts", lambda *_: ())
    return found


class Engine:
    """An engine of compare on the fake machine, in this process."""

    version = "fake"

    def __init__(self, machine):
        self._machine = machine

    def ask(self, load=None, run=None, audit=None):
        if run is None:
            return {"load_s": 1.0} if load else {"passed": True, "verdict": "passed: as if"}
        times = [(1 + place) * self._machine.step_s() for place in range(run["new_tokens"])]
        return {"tokens": [7] * run["new_tokens"], "times_s": times, "peak_memory_mb": None}

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


COMMANDS = {
    "latency": ["--prompt-len", "4", "--gen-len", "3"],
    "throughput": ["--gen-len", "3"],
    "rows": ["--rows", "3", "--prompt-len", "12", "--gen-len", "12", "--arrival-len", "30"],
    "kernels": ["--context", "9"],
    "compare": ["--prompt-len", "4", "--gen-len", "3", "--engines", "gemma-runtime,hf-static"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_machine_that_slows_down_between_rounds_leaves_the_share_as_it_was(
    command, machine, small_pair, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(compare, "Worker", lambda *_: Engine(machine))
    monkeypatch.setattr(compare, "SETTLE_S", 0.0)
    monkeypatch.setattr("runtime.bench.products.WEIGHT_BYTES", 1e5)
    model = small_pair("gemma3").ours
    (file := tmp_path / "prompts.jsonl").write_text('{"prompt": [5, 6, 7, 8]}\n')
    arguments = [*([str(file)] if command == "throughput" else []), *COMMANDS[command], "--model", model.name]
    arguments += ["--device", "cpu", "--dtype", "float32", "--warmup", "0", "--repeat", str(ROUNDS), "--output", "json"]
    assert cli.main(["bench", command, *arguments]) == 0
    report = Report.model_validate_json(capsys.readouterr().out)
    assert report.all_rows and report.environment.read_bandwidth
    for row in report.all_rows:
        readings, shares = row.read_bandwidth_readings_gb_s, row.shares_of_read_bandwidth
        assert len(readings.values) == len(shares.values) == ROUNDS
        assert shares.values == pytest.approx([shares.p50] * ROUNDS, rel=1e-6)
        assert row.share_of_read_bandwidth == shares.p50 and row.read_bandwidth_gb_s == readings.p50
    assert len({rate for row in report.all_rows for rate in row.read_bandwidth_readings_gb_s.values}) == 2
    if command in ("latency", "throughput", "compare"):
        assert shares.p50 == pytest.approx(row.bytes_per_step / STEP_BYTES, rel=1e-6)


def test_a_share_is_of_its_own_rounds_reading():
    # 30 of 40, 12 of 20 and 45 of 50; of the best reading they would be 60 %, 24 % and 90 %.
    found = ceiling_figures([30.0, 12.0, 45.0], [40.0, 20.0, 50.0], 100.0)
    assert found["shares_of_read_bandwidth"].values == pytest.approx((0.75, 0.6, 0.9))
    assert found["share_of_read_bandwidth"] == pytest.approx(0.75)
    assert found["read_bandwidth_gb_s"] == 40.0 and found["read_bandwidth_readings_gb_s"].values == (40.0, 20.0, 50.0)
    assert found["achieved_gb_s"] == 30.0 and found["share_of_datasheet"] == pytest.approx(0.3)
    with pytest.raises(ValueError, match="zip"):
        ceiling_figures([30.0, 12.0], [40.0], None)

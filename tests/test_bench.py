"""The GPU campaign: that it still runs, that it gives no speed for wrong tokens, and the report made of results."""

import json
import re
from pathlib import Path

import pytest

import runtime.bench
from runtime.bench import gpu, report


def test_every_part_of_the_gpu_campaign_runs_at_toy_size(tmp_path):
    parts = ["machine", "gates", "kernels", "steps", "host_loop", "peers", "timeline"]
    arguments = ["--dry-run", "--out", str(tmp_path / "toy"), "--models", "gemma-2-2b", "--parts", ",".join(parts)]
    assert gpu.main(arguments) == 0
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "toy").glob("*.json")}
    assert found.keys() == {*parts, "audits"}
    assert found["gates"]["rows"][0]["passed"] and found["machine"]["machine"]["interpreted"]
    for part in parts[1:]:
        assert found[part]["rows"] and found[part]["not_measured"] == [], part
    assert all(row["step_us"] > 0 for row in found["steps"]["rows"])
    assert (tmp_path / "toy" / "timeline-gemma-2-2b.png").stat().st_size > 1000

    out = tmp_path / "report" / "RESULTS.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    text = out.read_text()
    assert (
        "| gemma-2-2b | float32 | 2 | 40 | 1 | no |" in text and "steps: gemma-1.1-2b, gemma-3-1b, gemma-3-270m" in text
    )
    assert (out.parent / "plots" / "toy.png").stat().st_size > 1000


@pytest.fixture
def no_ceilings(monkeypatch):
    monkeypatch.setattr(gpu, "ceilings", lambda device, elements: {"read_gb_s": 1.0})


@pytest.mark.usefixtures("no_ceilings")
def test_a_failed_gate_ends_the_campaign_without_speeds(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gate", lambda scale, name, dtype: {"model": name, "passed": False})
    monkeypatch.setattr(gpu, "audit", lambda scale, name: {"model": name})
    record = gpu.Record(tmp_path, minutes=1)
    assert gpu.campaign(record, gpu.TOY, ["gemma-3-1b"], ["gates", "steps"], tests=tmp_path) == 1
    assert not (tmp_path / "steps.json").exists()


@pytest.mark.usefixtures("no_ceilings")
def test_a_campaign_out_of_time_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "steps", lambda *_: pytest.fail("measured after the time was up"))
    record = gpu.Record(tmp_path, minutes=0)
    assert gpu.campaign(record, gpu.TOY, ["gemma-3-1b"], ["steps"], tests=tmp_path) == 0
    assert json.loads((tmp_path / "steps.json").read_text())["not_measured"] == ["gemma-3-1b"]


def test_the_report_is_what_the_results_say(tmp_path):
    folder = Path(runtime.bench.__file__).parent
    assert report.main(["--out", str(tmp_path / "RESULTS.md")]) == 0
    assert (folder / "RESULTS.md").read_text() == (tmp_path / "RESULTS.md").read_text(), "run runtime.bench.report"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gemma-9b"], "--models: expected some of gemma-1.1-2b, .* got gemma-9b"),
        (["--parts", "gates,speed"], "--parts: expected some of machine, .* got speed"),
        (["--minutes", "soon"], "invalid float value: 'soon'"),
    ],
)
def test_bad_arguments_of_the_campaign_end_with_one_line(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])

"""The GPU campaign: that it still runs, that it gives no speed for wrong tokens, and the report made of results."""

import json
import re
from pathlib import Path

import pytest

import runtime.bench
from runtime.bench import gpu, report
from runtime.cost.bandwidth import ReadBandwidth

pytestmark = pytest.mark.newest_only


@pytest.mark.sweep
def test_every_part_of_the_gpu_campaign_runs_at_toy_size(tmp_path):
    parts = [  # all but "quantized", whose gates take minutes in the interpreter
        "machine",
        "constants",
        "gates",
        "kernels",
        "steps",
        "host_loop",
        "guesses",
        "peers",
        "timeline",
    ]
    arguments = ["--dry-run", "--out", str(tmp_path / "toy"), "--models", "gemma-2-2b", "--parts", ",".join(parts)]
    assert gpu.main(arguments) == 0
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "toy").glob("*.json")}
    assert found.keys() == {*parts, "audits"}
    assert found["gates"]["rows"][0]["passed"] and found["machine"]["machine"]["interpreted"]
    assert found["machine"]["machine"]["read_gb_s"] > 0 and found["machine"]["machine"]["empty_launch_us"] > 0
    assert {row["shape"] for row in found["kernels"]["rows"]} >= {"1 x 48 -> 160", "2 x 48 -> 160", "context 40"}
    assert all(row["read_gb_s"] > 0 for part in ("kernels", "steps") for row in found[part]["rows"])
    assert set(found["constants"]) >= {"clocks", "clock_ghz"}
    for part in parts[2:]:
        assert found[part]["rows"] and found[part]["not_measured"] == [], part
    assert all(row["step_us"] > 0 for row in found["steps"]["rows"])
    assert {kernel["duration_us"] > 0 for row in found["timeline"]["rows"] for kernel in row["kernels"]} == {True}

    out = tmp_path / "report" / "RESULTS.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    text = re.sub(" +", " ", out.read_text())
    for line in ("| gemma-2-2b | float32 | 2 | 2 | 40 | 1 | no |", "Kernels of one step as the profiler sees them:"):
        assert line in text


@pytest.fixture
def no_ceilings(monkeypatch):
    monkeypatch.setattr(gpu, "launch_costs", lambda device: {})
    monkeypatch.setattr(ReadBandwidth, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(ReadBandwidth, "gb_s", lambda self: 1.0)


@pytest.mark.usefixtures("no_ceilings")
def test_a_failed_gate_ends_the_campaign_without_speeds(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gate", lambda scale, name, dtype: {"model": name, "passed": False})
    monkeypatch.setattr(gpu, "audit", lambda scale, name: {"model": name})
    record = gpu.Record(tmp_path, minutes=1)
    assert gpu.campaign(record, gpu.TOY, ["gemma-3-1b"], ["gates", "steps"], tests=[tmp_path]) == 1
    assert not (tmp_path / "steps.json").exists()


TESTS = {
    "failed": ("def test_one(): ...\ndef test_other(): raise ValueError", gpu.FAILED),
    "fixture missing": ("def test_one(no_such_fixture): ...", gpu.FAILED),
    "not importable": ("import no_such_module", gpu.FAILED),
    "none selected": ("pytestmark = []\ndef test_one(): ...", gpu.NOTHING_RAN),
    "all skipped": ("def test_one(): pytest.skip('no GPU')", gpu.NOTHING_RAN),
    "empty": (None, gpu.NOTHING_RAN),
    "no folder": (None, gpu.NOTHING_RAN),
    "passed": ("def test_one(): ...\ndef test_other(): pytest.skip('no second GPU')", 0),
}


@pytest.mark.usefixtures("no_ceilings")
@pytest.mark.parametrize("content", TESTS)
def test_the_campaigns_tests_decide_whether_it_goes_on(content, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "steps", lambda scale, name: [{"model": name}])
    monkeypatch.setattr(gpu, "TEST_PROCESSES", 1)  # for one test; each more starts in seconds
    source, expected = TESTS[content]
    folder = tmp_path / "tests"
    if content != "no folder":
        folder.mkdir()
    if source is not None:
        (folder / "test_it.py").write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{source}\n")
    record = gpu.Record(tmp_path / "out", minutes=1)
    assert gpu.campaign(record, gpu.TOY, ["gemma-3-1b"], ["tests", "steps"], tests=[folder]) == expected
    kept = json.loads((record.folder / "tests.json").read_text())
    assert kept["ran"] == (expected != gpu.NOTHING_RAN) and not (kept["passed"] and expected == gpu.FAILED)
    assert (record.folder / "steps.json").exists() == (expected == 0)


def test_the_commands_exit_code_is_the_campaigns(tmp_path):
    (tmp_path / "test_it.py").write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{TESTS['failed'][0]}\n")
    arguments = ["--dry-run", "--out", str(tmp_path / "out"), "--parts", "tests,steps", "--tests", str(tmp_path)]
    assert gpu.main(arguments) == gpu.FAILED
    assert not (tmp_path / "out" / "steps.json").exists()


def raising(*_):
    raise RuntimeError("out of memory")


@pytest.mark.usefixtures("no_ceilings")
def test_gates_that_raise_or_do_not_run_end_the_campaign(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gate", raising)
    monkeypatch.setattr(gpu, "audit", lambda scale, name: {"model": name})
    for minutes, expected in ((1, gpu.FAILED), (0, gpu.NOTHING_RAN)):
        record = gpu.Record(tmp_path, minutes=minutes)
        assert gpu.campaign(record, gpu.TOY, ["gemma-3-1b"], ["gates", "steps"], tests=[tmp_path]) == expected
        assert not (tmp_path / "steps.json").exists()
        assert (tmp_path / "failures.json").exists() == (minutes == 1), "those of the run before are gone"


@pytest.mark.usefixtures("no_ceilings")
def test_a_part_that_raises_is_recorded_and_the_others_are_measured(tmp_path, monkeypatch):
    def of_one_model(scale, name):
        yield {"model": name}
        if name == "gemma-3-1b":
            raising()

    monkeypatch.setattr(gpu, "steps", of_one_model)
    monkeypatch.setattr(gpu, "host_loop", lambda scale, name: {"model": name})
    record = gpu.Record(tmp_path, minutes=1)
    names = ["gemma-3-1b", "gemma-2-2b"]
    assert gpu.campaign(record, gpu.TOY, names, ["steps", "host_loop"], tests=[tmp_path]) == gpu.PART_FAILED
    for part in ("steps", "host_loop"):
        assert [row["model"] for row in json.loads((tmp_path / f"{part}.json").read_text())["rows"]] == names
    kept = json.loads((tmp_path / "failures.json").read_text())["failures"]
    assert kept == [{"failed": "steps", "model": "gemma-3-1b", "error": "RuntimeError: out of memory"}]


def test_a_machine_that_cannot_be_measured_ends_the_campaign(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "machine", raising)
    record = gpu.Record(tmp_path, minutes=1)
    assert gpu.campaign(record, gpu.TOY, ["gemma-3-1b"], ["steps"], tests=[tmp_path]) == gpu.PART_FAILED
    assert (tmp_path / "failures.json").exists() and not (tmp_path / "steps.json").exists()


@pytest.mark.usefixtures("no_ceilings")
def test_a_campaign_out_of_time_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "steps", lambda *_: pytest.fail("measured after the time was up"))
    record = gpu.Record(tmp_path, minutes=0)
    assert gpu.campaign(record, gpu.TOY, ["gemma-3-1b"], ["steps"], tests=[tmp_path]) == 0
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


def test_versions_are_told_where_the_package_runs_without_being_installed(monkeypatch):
    """As from a copy of its files on a machine of a day."""
    from importlib import metadata

    from runtime.cost.info import installed_versions

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    versions = installed_versions()
    assert versions["gemma-runtime"] is None and versions["torch"] is None and versions["python"]

"""What `gemma-runtime bench` refuses before it measures, and what it shows of what the audit refused."""

import csv
import io

import pytest

from runtime.bench import operations, sweep
from runtime.bench.records import Audit, Report
from runtime.cli import main as cli

pytestmark = pytest.mark.newest_only


@pytest.fixture
def model(small_pair):
    return small_pair("gemma3").ours


@pytest.fixture
def refusing(monkeypatch, tmp_path, read_gb_s):
    """An audit that says no, and clocks that may not be used."""
    read_gb_s(lambda: pytest.fail("measured what was refused"))
    for module in (sweep, operations):
        monkeypatch.setattr(module, "audit", lambda model: Audit(passed=False, verdict="refused: as if"))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": [5, 6, 7]}\n')
    return {"latency": ["--prompt-len", "4,7", "--gen-len", "2"], "throughput": [str(file)], "kernels": []}


@pytest.mark.parametrize("command", ["latency", "throughput", "kernels"])
def test_what_the_audit_refuses_has_no_numbers(model, command, refusing, capsys):
    given = ["bench", command, *refusing[command], "--model", model.name, "--device", "cpu", "--dtype", "float32"]
    assert cli.main([*given, "--output", "json"]) == 1
    rows = Report.model_validate_json(capsys.readouterr().out).all_rows
    assert len(rows) == {"latency": 2, "throughput": 1, "kernels": 6}[command]
    for row in rows:
        assert row.status == "refused" and row.audit.verdict == "refused: as if"
        told = row.model_dump(exclude_none=True).keys()
        assert not {name for name in told - {"load_s"} if name.endswith(("_s", "_ms", "_us", "_mb")) or "share" in name}

    assert cli.main([*given, "--output", "md"]) == 1
    shown = capsys.readouterr().out
    assert "refused: as if" in shown and "GB/s" not in shown

    assert cli.main([*given, "--output", "csv"]) == 1
    for line in csv.DictReader(io.StringIO(capsys.readouterr().out)):
        assert line["status"] == "refused" and line["audit_passed"] == "False" and line["schema_version"] == "1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "{0}/none/a.json"], "cannot write the report {0}/none/a.json: no folder {0}/none"),
        (["--html", "{0}/none/a.html"], "cannot write the report {0}/none/a.html: no folder {0}/none"),
        (["--json", "{0}/a.json", "--html", "{0}/a.json"], "expected two files, got it for both"),
        (["--html", "{0}"], "cannot write the report {0}: it is a folder"),
        (["--json", "--output", "csv"], "--json prints JSON, and csv was asked for too"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_before_anything_is_measured(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sweep, "load_model", lambda *_, **__: pytest.fail("loaded a model"))
    assert cli.main(["bench", "latency", *(argument.format(tmp_path) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and message.format(tmp_path) in err
    assert not list(tmp_path.iterdir())

"""`bench latency`, `throughput` and `kernels` on a small model, and what the command line makes of them."""

import dataclasses
import json
import re
import signal
import statistics

import pytest

import runtime
from runtime.bench import measure, operations, sweep
from runtime.bench.records import Audit, Report
from runtime.cli import main as cli
from runtime.parity.faults import faulty_models

pytestmark = [pytest.mark.newest_only, pytest.mark.usefixtures("steady_ceiling")]


@pytest.fixture
def model(small_pair):
    return small_pair("gemma3").ours


@pytest.fixture
def passing(monkeypatch):
    """The audit's answer without its seconds: what it answers is tested once, on a fault."""
    for module in (sweep, operations):
        monkeypatch.setattr(module, "audit", lambda model: Audit(passed=True, verdict="passed: as if"))


def bench(model, command, *arguments):
    return cli.main(["bench", command, "--model", model.name, "--device", "cpu", "--dtype", "float32", *arguments])


def test_a_sweep_has_every_number(model, tmp_path, capsys):
    kept, page = tmp_path / "report.json", tmp_path / "report.html"
    sizes = ["--prompt-len", "5,20", "--gen-len", "6", "--batch-size", "1,2", "--repeat", "3"]
    assert bench(model, "latency", *sizes, "--json", str(kept), "--html", str(page)) == 0
    out, err = capsys.readouterr()
    report = Report.from_file(kept)
    assert [(row.batch_size, row.prompt_len) for row in report.rows] == [(1, 5), (1, 20), (2, 5), (2, 20)]
    for row in report.rows:
        assert row.audit.passed and row.status == "ok" and row.reason is None
        assert len(row.ttft_ms.values) == len(row.tpot_ms.values) == 3 and len(row.inter_token_ms.values) == 15
        cached = model.plan.bytes_per_token(row.prompt_len + 3) - model.plan.weights
        assert row.bytes_per_step == model.plan.weights + row.batch_size * cached
        assert row.bytes_per_token == round(row.bytes_per_step / row.batch_size)
        assert row.tpot_ms.values == pytest.approx(
            [statistics.mean(row.inter_token_ms.values[start : start + 5]) for start in (0, 5, 10)]
        )
        assert row.decode_tokens_per_s.values == pytest.approx(
            [row.batch_size * 1e3 / spent for spent in row.tpot_ms.values]
        )
        assert row.prefill_tokens_per_s.values == pytest.approx(
            [row.batch_size * row.prompt_len * 1e3 / spent for spent in row.ttft_ms.values]
        )
        assert row.share_of_read_bandwidth == pytest.approx(row.bytes_per_step / row.tpot_ms.p50 / 1e6 / 20.0)
        assert row.load_s > 0 and row.first_call_s > 0 and row.peak_memory_mb > 100
        assert {part.name for part in row.parts} >= {"gated_mlp", "residual_linear"}
    assert "pp20" in out and "tg6 @ d20" in out and "passed: 2 of 2 prompts" in out and "20.0 GB/s" in out
    assert "round 3 of 3" in err
    assert report.environment.threads >= 1 and report.environment.versions["torch"]
    assert page.stat().st_size > 10_000


def test_a_broken_runtime_gets_no_speed(model, monkeypatch, capsys):
    honest = sweep.load_model

    def broken(*arguments, **options):
        loaded, spent = honest(*arguments, **options)
        wrong = dict(faulty_models(loaded, 128))["rotary base 1 % too large"].rope
        return dataclasses.replace(loaded, rope=wrong), spent

    monkeypatch.setattr(sweep, "load_model", broken)
    monkeypatch.setattr(sweep, "measure", lambda *_: pytest.fail("timed a broken runtime"))
    assert bench(model, "latency", "--prompt-len", "5", "--gen-len", "3", "--output", "json") == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["status"] == "refused" and not row["audit"]["passed"] and row["reason"].startswith("refused")
    assert [name for name, value in row.items() if name.endswith(("_ms", "_s", "_mb")) and value is not None] == [
        "load_s"
    ]


@pytest.mark.usefixtures("passing")
@pytest.mark.parametrize("by", ["Ctrl-C", "SIGTERM"])
def test_an_interrupted_sweep_keeps_its_rows(by, model, monkeypatch, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    kept, honest, runs = tmp_path / "kept.json", sweep.run_request, []

    def run(*arguments):
        runs.append(arguments)
        if len(runs) == 8:  # first calls and warm-ups of two cases are 4, so both have one run, the second case two
            if by == "Ctrl-C":  # the signal itself is ignored where the suite runs in the background
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        return honest(*arguments)

    monkeypatch.setattr(sweep, "run_request", run)
    arguments = ["--prompt-len", "4,7", "--gen-len", "3", "--repeat", "5", "--output", "json", "--json", str(kept)]
    assert bench(model, "latency", *arguments) == 130
    assert capsys.readouterr().out == kept.read_text()
    rows = Report.from_file(kept).rows
    assert [(row.prompt_len, len(row.ttft_ms.values)) for row in rows] == [(4, 1), (7, 2)]
    assert [row.reason for row in rows] == [f"interrupted after {count} of 5 runs" for count in (1, 2)]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("passing")
@pytest.mark.parametrize(("error", "expected"), [(KeyboardInterrupt(), 130), (ValueError("out of room"), 2)])
def test_what_is_measured_is_kept_whatever_comes_after(model, monkeypatch, capsys, error, expected):
    def stop(*_):
        raise error

    monkeypatch.setattr(sweep, "step_parts", stop)
    sizes = ["--prompt-len", "4,7", "--gen-len", "3", "--warmup", "0", "--repeat", "2"]
    assert bench(model, "latency", *sizes, "--output", "json") == expected
    rows = Report.model_validate_json(capsys.readouterr().out).rows
    assert [(row.prompt_len, len(row.ttft_ms.values)) for row in rows] == [(4, 2), (7, 2)]
    assert all(row.read_bandwidth_gb_s == 20.0 and row.reason is None and not row.parts for row in rows)


@pytest.mark.parametrize("command", ["latency", "throughput"])
def test_the_first_call_comes_before_the_audit_which_would_compile_for_it(model, command, monkeypatch, tmp_path):
    (file := tmp_path / "prompts.jsonl").write_text('{"prompt": [5, 6, 7]}\n')
    honest, order = sweep.run_request, []

    def run(asked, *arguments):
        order.append("compiles" if asked.engine is None else "runs")
        return honest(asked, *arguments)

    def audit(asked):
        order.append("audit")
        return Audit(passed=True, verdict="passed: as if")

    monkeypatch.setattr(sweep, "run_request", run)
    monkeypatch.setattr(sweep, "audit", audit)
    given = ["--prompt-len", "3"] if command == "latency" else [str(file)]
    assert bench(model, command, *given, "--gen-len", "2", "--warmup", "0", "--repeat", "2") == 0
    assert order == ["compiles", "audit", "runs", "runs"]


def test_a_prompt_that_is_run_again_is_run_in_full(small_pair):
    """Whole chunks of it would otherwise be copied from the run before, and its TTFT would leave them out."""
    model = small_pair("gemma3").in_chunks(16).ours
    prompt = list(range(5, 45))
    for _ in range(2):
        measure.run_request(model, [prompt], 2)
    assert not runtime.generate(model, prompt, max_new_tokens=1).stats.cached_tokens


@pytest.mark.usefixtures("passing")
def test_runs_take_turns(model, monkeypatch):
    honest, order = sweep.run_request, []

    def run(model, prompts, *sizes):
        order.append(len(prompts[0]))
        return honest(model, prompts, *sizes)

    monkeypatch.setattr(sweep, "run_request", run)
    assert bench(model, "latency", "--prompt-len", "4,7", "--gen-len", "2", "--warmup", "0", "--repeat", "3") == 0
    assert order == [4, 7, 4, 7, 7, 4, 4, 7]


@pytest.mark.usefixtures("passing")
def test_rows_before_an_error_are_shown(model, capsys):
    code = cli.main(
        ["bench", "latency", "--model", model.name, "--dtype", "float32,int8", "--prompt-len", "4", "--gen-len", "2"]
    )
    out, err = capsys.readouterr()
    assert code == 2 and "tg2 @ d4" in out and "got 'int8'" in err.splitlines()[-1]


@pytest.mark.usefixtures("passing")
def test_a_file_of_prompts(model, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    lengths = [3, 9, 5]
    file.write_text("".join(json.dumps({"prompt": list(range(5, 5 + length))}) + "\n" for length in lengths))
    arguments = [str(file), "--batch-size", "2", "--gen-len", "4", "--repeat", "2", "--output", "json"]
    assert bench(model, "throughput", *arguments) == 0
    (row,) = Report.model_validate_json(capsys.readouterr().out).rows
    assert (row.requests, row.batch_size, row.prompt_len) == (3, 2, 6)
    assert len(row.output_tokens_per_s.values) == 2 and len(row.ttft_ms.values) == 4  # batches of 2 and 1, twice
    steps = [measure.bytes_per_step(model.plan, batch, 4) for batch in ([3, 9], [5])]
    assert row.bytes_per_step == round(statistics.mean(steps))
    # Two passes, of prefill and decoding of all batches.
    spent = sum(row.ttft_ms.values) + sum(row.inter_token_ms.values)
    assert sum(3 * 4 / rate for rate in row.output_tokens_per_s.values) * 1e3 == pytest.approx(spent)


@pytest.mark.usefixtures("passing")
def test_an_interrupted_file_of_prompts_keeps_its_whole_passes(model, monkeypatch, tmp_path, capsys):
    (file := tmp_path / "prompts.jsonl").write_text('{"prompt": [5, 6, 7]}\n{"prompt": [8, 9]}\n')
    honest, runs = sweep.run_request, []

    def run(*arguments):
        runs.append(arguments)
        if len(runs) == 6:  # the first pass has two requests, the second too, the third is not finished
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(sweep, "run_request", run)
    arguments = [str(file), "--gen-len", "3", "--warmup", "0", "--repeat", "4", "--output", "json"]
    assert bench(model, "throughput", *arguments) == 130
    (row,) = Report.model_validate_json(capsys.readouterr().out).rows
    assert row.reason == "interrupted after 1 of 4 runs"
    assert len(row.output_tokens_per_s.values) == 1 and len(row.ttft_ms.values) == 2


@pytest.mark.usefixtures("passing")
def test_kernels_stand_beside_pytorch(model, capsys, monkeypatch):
    monkeypatch.setattr("runtime.bench.products.WEIGHT_BYTES", 1e5)
    assert bench(model, "kernels", "--context", "9,40", "--batch-size", "1,2", "--repeat", "2", "--output", "json") == 0
    rows = Report.model_validate_json(capsys.readouterr().out).kernels
    config = model.config
    found = {(row.kernel, row.shape): row for row in rows}
    assert len(found) == 5 * 2 + 2
    mlp = found["gated_mlp", f"2 x {config.hidden} -> {2 * config.intermediate}"]
    assert mlp.bytes == 2 * config.intermediate * config.hidden * 4
    assert mlp.achieved_gb_s == pytest.approx(statistics.median(mlp.bytes / us / 1e3 for us in mlp.time_us.values))
    assert all(row.torch_us.p50 > 0 and len(row.time_us.values) == 2 for row in rows)
    # Four layers; at 40 tokens three of them see a window of 16.
    of_one = 2 * config.layers[0].kv_heads * config.layers[0].head_dim * 4
    assert found["decode_attention", "context 9"].bytes == 9 * of_one
    assert found["decode_attention", "context 40"].bytes == (3 * 16 + 40) * of_one // 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--gen-len", "1"], "expected at least 2, got 1"),
        (["latency", "--batch-size", "65"], "expected 1 to 64, got 65"),
        (["latency", "--repeat", "0"], "expected at least 1, got 0"),
        (["latency", "--prompt-len", "8,,9"], "expected a whole number, got ''"),
        (["latency", "--prompt-len", "600"], "max_seq_len must be at most .*512.*, got 664"),
        (["latency", "--dtype", "int8"], "got 'int8'"),
        (["latency", "--device", "tpu"], "got 'tpu'"),
        (["latency", "--output", "yaml"], "invalid choice: 'yaml'"),
        (["throughput", "/no/such/file"], "No such file"),
        (["speed"], "invalid choice: 'speed'"),
        (["diff", "/no/a.json", "/no/b.json"], "No such file"),
    ],
)
def test_bad_flags_end_with_one_line_and_exit_code_2(model, arguments, message, capsys):
    given = (
        [*arguments, "--model", model.name] if arguments and arguments[0] in ("latency", "throughput") else arguments
    )
    try:
        code = cli.main(["bench", *given])
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert re.search(message, err), err

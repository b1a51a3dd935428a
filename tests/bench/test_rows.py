"""`bench rows` on a small model: what it measures, on a clock of its own too, and that a wrong answer has no speed."""

import dataclasses
import re
import time

import pytest

from runtime.bench import rows, workload
from runtime.bench.records import Audit, InFlightRow, Report
from runtime.bench.workload import Workload
from runtime.cli import main as cli
from runtime.cost.bandwidth import ReadBandwidth
from runtime.engine import decode, pending
from runtime.engine.prefill import Prefill

pytestmark = pytest.mark.newest_only

SIZES = ["--rows", "3", "--prompt-len", "12", "--gen-len", "12", "--arrival-len", "30"]
PASSED = Audit(passed=True, verdict="passed: as if")


@pytest.fixture(autouse=True)
def stubs(monkeypatch, steady_ceiling):
    """The bandwidth and the audit's answer without their seconds."""
    monkeypatch.setattr(rows, "audit", lambda model: PASSED)


@pytest.fixture
def model(small_pair):
    return small_pair("gemma3").ours


def bench(model, *arguments):
    return cli.main(["bench", "rows", model.name, "--device", "cpu", "--dtype", "float32", *SIZES, *arguments])


def test_it_has_every_figure(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "LEAST_GAPS", 30)
    kept = tmp_path / "report.json"
    assert bench(model, "--repeat", "3", "--json", str(kept)) == 0
    out, err = capsys.readouterr()
    report = Report.from_file(kept)
    (row,) = report.in_flight
    assert row.status == "ok" and row.reason is None and not report.rows
    assert (row.rows, row.requests, row.arrival_len) == (3, 12, 30)
    for name in ("decode", "output"):
        ours, static, ratio = (
            getattr(row, field).values
            for field in (f"{name}_tokens_per_s", f"static_{name}_tokens_per_s", f"{name}_ratio")
        )
        assert ratio == pytest.approx([a / b for a, b in zip(ours, static, strict=True)]) and len(ratio) == 3
    # Of 12 tokens the first comes before any step, and prompts arrive from the second on.
    assert len(row.inter_token_ms.values) == 3 * 10 and 3 <= row.arrivals <= 30
    assert row.inter_token_p99_ms == row.inter_token_ms.p99
    assert row.inter_token_max_ms == max(row.inter_token_ms.values)
    assert row.limit_ms == pytest.approx(2 * row.step_ms.p50 + row.budget_ms.p50)
    assert row.meets_limit == (row.inter_token_p99_ms <= row.limit_ms)
    assert row.meets_decode_ratio == (row.decode_ratio.p50 >= 0.9)
    assert report.environment.threads >= 1 and report.environment.versions["torch"]
    assert "round 3 of 3" in err
    assert "12 requests" in out and "pp30 arriving" in out and "20.0 GB/s" in out and "passed: as if" in out


def test_few_gaps_have_no_99th_percentile(model, capsys):
    assert bench(model, "--repeat", "1", "--output", "md") == 0
    out = capsys.readouterr().out
    assert "too few samples (10 gaps" in out


def test_a_report_of_rows_can_be_compared(model, tmp_path, capsys):
    kept = tmp_path / "report.json"
    assert bench(model, "--repeat", "5", "--json", str(kept)) == 0
    capsys.readouterr()
    assert cli.main(["bench", "diff", str(kept), str(kept)]) == 0
    assert capsys.readouterr().out.count("no difference") == 2


@pytest.mark.parametrize(
    ("plants_in", "message"),
    [
        (lambda run, answer: len(run) == 3 and answer.max_new_tokens < 12, r"in flight, request \d+: token 2 is"),
        (lambda run, answer: len(run) == 3 and answer.call.arrived, r"static batch from request 0, row \d: token 2 is"),
    ],
    ids=["in-flight", "static"],
)
def test_a_wrong_answer_has_no_speed(model, plants_in, message, monkeypatch, tmp_path, capsys):
    """Its third token is another where it shares the step."""
    honest, hand_out = pending.give, pending.PendingTokens.hand_out_oldest
    running = []

    def hand_out_oldest(self):
        running[:] = self._launched[0].answers
        hand_out(self)

    def give(answer, token, step):
        is_wrong = len(answer.token_ids) == 2 and plants_in(running, answer)
        honest(answer, (token + 1) % model.config.vocab if is_wrong else token, step)

    monkeypatch.setattr(pending.PendingTokens, "hand_out_oldest", hand_out_oldest)
    monkeypatch.setattr(pending, "give", give)
    monkeypatch.setattr(rows, "_figures", lambda *_: pytest.fail("gave numbers to wrong answers"))
    kept = tmp_path / "report.json"
    assert bench(model, "--json", str(kept)) == 1
    (row,) = Report.from_file(kept).in_flight
    assert row.status == "refused" and re.search(message, row.reason)
    assert row.reason in capsys.readouterr().out and row.decode_tokens_per_s is None


def test_what_the_audit_refuses_is_not_run(model, monkeypatch, capsys):
    monkeypatch.setattr(rows, "audit", lambda model: Audit(passed=False, verdict="refused: as if"))
    monkeypatch.setattr(rows, "Workload", lambda *_: pytest.fail("ran what was refused"))
    assert bench(model) == 1
    assert "refused: as if" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_rounds(model, monkeypatch, capsys):
    honest, rounds = Workload.round, []

    def stop(self, number):
        rounds.append(number)
        if len(rounds) == 4:  # one before those measured, and two
            raise KeyboardInterrupt
        return honest(self, number)

    monkeypatch.setattr(Workload, "round", stop)
    assert bench(model, "--repeat", "5", "--output", "json") == 130
    (row,) = Report.model_validate_json(capsys.readouterr().out).in_flight
    assert row.reason == "interrupted after 2 of 5 rounds" and len(row.decode_ratio.values) == 2


@pytest.fixture
def work(model, monkeypatch):
    """A workload on a clock on which a step takes a second, a whole prompt an hour, and all else nothing."""
    sizes = {"rows": 3, "requests": 12, "prompt_len": 12, "gen_len": 12, "arrival_len": 40}
    model = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, max_batch=3))
    row = InFlightRow(audit=PASSED, model="small", dtype="float32", **sizes)
    made = Workload(model, row, ReadBandwidth(model.device))
    now, steppers, advance = [0.0], decode.stepper, Prefill.advance

    def stepper(*arguments):
        step = steppers(*arguments)

        def timed():
            now[0] += 1
            step()

        return timed

    def timed_part(self, work):
        before = self.tokens
        done = advance(self, work)
        now[0] += 3600 * (self.tokens - before) / len(self._ids)
        return done

    monkeypatch.setattr(decode, "stepper", stepper)
    monkeypatch.setattr(Prefill, "advance", timed_part)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return made


def test_prompts_are_part_of_the_whole_run_alone(work):
    """Steps of all rows take a second each, whatever prompts take between others."""
    tokens = sum(job.new_tokens for job in work.requests)
    for rates in (work.in_flight(), work.static()):
        assert rates.decode == pytest.approx(3)
        assert tokens / rates.output == pytest.approx(12 * 3600, rel=0.01)
    assert work.step_ms() == 1000


@pytest.mark.parametrize(("budget", "expected"), [(16, 16), (100, 40)])
def test_the_budget_is_a_share_of_the_prompt(work, monkeypatch, budget, expected):
    monkeypatch.setattr(workload, "prefill_budget", lambda model: budget)
    assert work.budget_tokens == expected
    assert work.budget_ms() == pytest.approx(3600 * 1e3 * expected / 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "2"], "expected 3 to 8, got 2"),
        (["--rows", "9"], "expected 3 to 8, got 9"),
        (["--gen-len", "11"], "expected at least 12, got 11"),
        (["--arrival-len", "600"], "max_seq_len must be at most .*512.*, got 602"),
        (["--model", "demo"], "not allowed with argument"),
    ],
)
def test_bad_options_end_with_one_line_and_exit_code_2(model, arguments, message, capsys):
    try:
        code = bench(model, *arguments)
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert re.search(message, err), err

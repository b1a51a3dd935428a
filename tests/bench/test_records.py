"""The schema, the statistics and the byte model: against cases worked by hand."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from runtime.bench import measure
from runtime.bench.diff import difference, median_ratio_interval
from runtime.bench.export import FORMS
from runtime.bench.measure import Request, bytes_per_step, finished
from runtime.bench.records import Audit, Environment, KernelRow, Part, Report, Row, Samples
from runtime.cost.plan import TARGETS, make_plan
from runtime.model import memory_plan
from runtime.model.config import ModelConfig, RuntimeConfig
from runtime.model.published import PUBLISHED

RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.fixture
def report():
    environment = Environment(
        device="cpu", device_name="a CPU", cores=2, threads=2, clocks_mhz=None, driver=None, datasheet_gb_s=None,
        load_average=0.5, versions={"torch": "2.13", "numba": None}, commit=None,
    )  # fmt: skip
    sizes = {"model": "demo", "dtype": "float32", "batch_size": 1, "prompt_len": 8, "gen_len": 3}
    samples = Samples(values=(1.0, 2.5, 1e-3))
    audit = Audit(passed=True, verdict="passed: 2 of 2")
    rows = [
        Row(benchmark="latency", engine="gemma-runtime", audit=audit, tpot_ms=samples, parts=(
            Part(name="gated_mlp", time_us=3.5, launches=18),), **sizes),
        Row(benchmark="compare", engine="vllm", status="skipped", reason='no "vllm",\nhere', **sizes),
    ]  # fmt: skip
    kernel = KernelRow(audit=audit, model="demo", dtype="float32", kernel="k", shape="1 x 2", time_us=samples, bytes=8)
    return Report(command="latency", time="2026-01-01T00:00:00Z", environment=environment).with_rows(*rows, kernel)


def test_a_report_comes_back_as_it_was(report, tmp_path):
    (tmp_path / "report.json").write_text(report.to_json())
    assert Report.from_file(tmp_path / "report.json") == report


@pytest.mark.parametrize("name", [*sorted(path.name for path in RESULTS.glob("compare-*.json")), "rows-cpu.json"])
def test_the_committed_reports_can_be_read(name):
    report = Report.from_file(RESULTS / name)
    assert report.all_rows and json.loads(report.to_json()).items() >= {"schema_version": 1}.items()
    found = difference(report, report)
    assert found.changes and found.exit_code() == 0 and not found.environments
    for form in FORMS.values():
        assert report.all_rows[0].model in form(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surplus": 1}, "surplus"),
        ({"rows": [{"engine": "x"}]}, r"rows\.0\."),
        ({"environment": None}, "environment"),
    ],
)
def test_another_schema_is_refused_by_name(report, tmp_path, change, message):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(report.to_json()) | change))
    with pytest.raises(ValueError, match=rf"report.json: expected a benchmark report of schema version 1: {message}"):
        Report.from_file(path)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_file_that_is_no_report_is_refused(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected a benchmark report"):
        Report.from_file(path)


def test_percentiles_of_a_worked_case():
    samples = Samples(values=(5.0, 1.0, 4.0, 2.0, 3.0))
    # Sorted 1 to 5, so the place of percentile p is 4 p / 100, counted from 0.
    assert samples.p50 == 3.0
    assert samples.p90 == pytest.approx(4.6)
    assert samples.p95 == pytest.approx(4.8)
    assert samples.p99 == pytest.approx(4.96)
    assert samples.quarters == (2.0, 4.0) and samples.spread == pytest.approx(2 / 3)
    assert Samples(values=(7.0,)).p99 == 7.0
    with pytest.raises(ValidationError):
        Samples(values=())


def test_figures_of_a_worked_case(monkeypatch):
    # Two rows; a prompt of 100 tokens each; three steps, at 0.5, 0.6 and 0.8 s.
    request = Request([[1, 2, 3], [4, 5, 6]], [0.5, 0.6, 0.8], 200, 3_000_000_000, 40.0)
    monkeypatch.setattr(measure, "datasheet_gb_s", lambda device: 80.0)
    sizes = {"model": "demo", "dtype": "float32", "batch_size": 2, "prompt_len": 100, "gen_len": 3}
    row = Row(benchmark="latency", **sizes)
    found = finished(row, [request], torch.device("cpu"), 1, 2)
    assert found.ttft_ms.values == pytest.approx((500,))
    assert found.inter_token_ms.values == pytest.approx((100, 200))
    assert found.tpot_ms.values == pytest.approx((150,))  # (0.8 - 0.5) / 2
    assert found.prefill_tokens_per_s.values == pytest.approx((400,))
    assert found.decode_tokens_per_s.values == pytest.approx((2 / 0.15,))
    assert found.bytes_per_token == 1_500_000_000
    assert found.achieved_gb_s == pytest.approx(20)
    assert found.share_of_read_bandwidth == pytest.approx(0.5)
    assert found.share_of_datasheet == pytest.approx(0.25)
    assert found.reason == "interrupted after 1 of 2 runs"


def test_bytes_of_a_worked_case():
    """Gemma 3 270M in bf16: 268,098,176 parameters; 18 layers, one key and one value of 256 each, 3 layers see all."""
    plan = memory_plan.plan(ModelConfig.from_hf(PUBLISHED["gemma-3-270m"]), RuntimeConfig("meta", "bfloat16", 4096))
    weights, row = 2 * 268_098_176, 2 * 256 * 2
    assert bytes_per_step(plan, [128], 64) == weights + 18 * 160 * row
    assert bytes_per_step(plan, [128, 128, 10], 64) == weights + 18 * (160 + 160 + 42) * row
    assert bytes_per_step(plan, [1000], 48) == weights + (15 * 512 + 3 * 1024) * row


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["gemma-1.1-2b", "gemma-2-2b", "gemma-3-270m"])
def test_the_byte_model_is_what_a_recorded_step_touches(name, batch):
    """The launches of a step, each tensor at its size, past Gemma 3's window: what the model leaves out are activations
    and the rows of the embedding."""
    config = ModelConfig.from_hf(PUBLISHED[name])
    counted = bytes_per_step(
        memory_plan.plan(config, RuntimeConfig("meta", "bfloat16", 4096, batch)), [592] * batch, 16
    )
    sheet = make_plan(config, name, "bfloat16", TARGETS["h100"], batch=batch, context=600)
    read = sum(cost.launches * cost.bytes_read for cost in sheet.kernels)
    assert 1.0 <= read / counted < 1.01


def test_an_interval_of_a_ratio():
    a = [10.0, 10.1, 9.9, 10.05, 9.95, 10.0, 10.02]
    ratio, low, high = median_ratio_interval(a, [2 * value for value in a])
    assert ratio == pytest.approx(2) and 1.96 < low < 2 < high < 2.04
    assert median_ratio_interval(a, a)[1] <= 1 <= median_ratio_interval(a, a)[2]

"""The page and the tables: what stands in them is what was measured, and nothing is fetched from anywhere."""

import csv
import io
import subprocess
import sys

import pytest

from runtime.bench import report as results
from runtime.bench.export import as_csv
from runtime.bench.html import page
from runtime.bench.records import Audit, Environment, KernelRow, Part, Report, Row, Samples
from runtime.bench.table import markdown, tables

from ..parsed_page import NASTY, ParsedPage

pytestmark = pytest.mark.newest_only

AUDIT = Audit(passed=True, verdict="passed: 2 of 2 prompts")


def row(engine="gemma-runtime", prompt_len=128, tpot=(20.0, 21.0, 22.0), **changed):
    tpot = Samples(values=tpot)
    numbers = {
        "load_s": 1.0, "first_call_s": 2.0, "ttft_ms": Samples(values=(100.0, 101.0, 102.0)), "tpot_ms": tpot,
        "inter_token_ms": Samples(values=(20.0, 21.0, 22.0, 90.0)),
        "prefill_tokens_per_s": Samples(values=(1280.0, 1270.0, 1260.0)),
        "decode_tokens_per_s": Samples(values=tuple(1e3 / value for value in tpot.values)),
        "bytes_per_step": 420_000_000, "bytes_per_token": 420_000_000, "achieved_gb_s": 20.0,
        "read_bandwidth_gb_s": 25.0, "share_of_read_bandwidth": 0.8, "peak_memory_mb": 1234.0,
    }  # fmt: skip
    sizes = {"model": "demo", "dtype": "bfloat16", "batch_size": 1, "prompt_len": prompt_len, "gen_len": 64}
    named = {"benchmark": "compare", "engine": engine, "audit": AUDIT if engine == "gemma-runtime" else None}
    return Row(**named | sizes | numbers | changed)


@pytest.fixture
def report():
    """A function that makes a report of some rows."""
    environment = Environment(
        device="cpu", device_name="a <b>CPU</b> & more", cores=2, threads=2, clocks_mhz=2600.0, driver=None,
        datasheet_gb_s=None, load_average=0.5, versions={"torch": "2.13", "numba": None}, commit="abc",
    )  # fmt: skip
    whole = Report(command="compare", time="2026-01-01T00:00:00Z", environment=environment)
    return whole.with_rows


@pytest.fixture
def full(report):
    parts = (Part(name="gated_mlp", time_us=9000.0, launches=18), Part(name="advance", time_us=10.0, launches=1))
    refused = Audit(passed=False, verdict="refused: 0 of 2 prompts")
    skipped = {
        "engine": "vllm",
        "model": "demo",
        "dtype": "bfloat16",
        "batch_size": 1,
        "prompt_len": 128,
        "gen_len": 64,
    }
    return report(
        row(parts=parts),
        row(prompt_len=512, parts=parts),
        row("hf-dynamic", tpot=(40.0, 50.0, 60.0), equal_tokens=0.75),
        Row(benchmark="compare", status="skipped", reason="no <script>vllm</script>", **skipped),
        Row(benchmark="compare", **skipped | {"dtype": "float16", "audit": refused, "status": "refused",
            "reason": refused.verdict}),
        KernelRow(
            audit=AUDIT, model="demo", dtype="bfloat16", kernel="gated_mlp", shape="1 x 640 -> 4096", bytes=5_000,
            time_us=Samples(values=(200.0, 210.0, 220.0)), torch_us=Samples(values=(420.0,)), achieved_gb_s=23.8,
            read_bandwidth_gb_s=25.0, share_of_read_bandwidth=0.95,
        ),
    )  # fmt: skip


def test_the_page_is_complete_in_itself(full):
    parsed = ParsedPage(page(full))
    assert "no <script>vllm" in parsed.text and "a <b>CPU" in parsed.text
    assert page(full) == page(full), "equal reports give equal pages"


def test_the_verdict_stands_at_the_top(full, report):
    parsed = ParsedPage(page(report(full.rows[0])))
    assert parsed.headings[0] == (1, "47.6 tokens/s, 80% of the read bandwidth, parity passed")
    assert "demo · bfloat16 · 2026-01-01 00:00:00 UTC · a <b>CPU</b> & more (cpu, 2 threads)" in parsed.text
    assert "64 tokens after a prompt of 128; the median of 3 runs" in parsed.text and parsed.all("header", "good")
    refused = ParsedPage(page(report(full.rows[4])))
    assert refused.headings[0] == (1, "1 of 1 configurations refused") and refused.all("header", "bad")
    assert ParsedPage(page(report(full.kernels[0]))).headings[0][1] == (
        "95% of the read bandwidth, 1 kernel, parity passed"
    )
    assert ParsedPage(page(report(full.rows[3]))).headings[0] == (1, "No configuration has numbers")


def test_a_row_that_is_refused_is_no_good_verdict(full, report):
    parsed = ParsedPage(page(report(full.rows[0], full.rows[4])))
    assert parsed.all("header", "bad") and "Without numbers:\n\ndemo, float16: refused: 0 of 2 prompts" in parsed.text
    changed = {"engine": "gemma-runtime", "status": "crashed", "reason": "exit code -9"}
    crashed = full.rows[3].model_copy(update=changed)
    assert "demo, bfloat16: exit code -9" in ParsedPage(page(report(crashed))).text.split("All numbers")[0]


def test_the_page_has_a_chart_of_everything_there_is(full, report):
    parsed = ParsedPage(page(full))
    assert [text for level, text in parsed.headings if level == 2] == [
        "Where a token’s time goes",
        "Speed over context",
        "Engines side by side",
        "Time between two tokens",
        "Kernels",
        "All numbers",
        "What the numbers depend on",
        "The report as JSON, raw samples included",
    ]
    assert len(parsed.all("table", "bars")) == 3
    labels = [attributes["aria-label"] for attributes in parsed.all("svg") if "aria-label" in attributes]
    assert len(labels) == 4 and labels[0].startswith("Lines of decoding, tokens/s over context")
    assert "gemma-runtime, bfloat16: 47.62 at 160, 47.62 at 544" in labels[0]
    for drawn in (
        "decoding, tokens/s", "bandwidth allows 59.5 tokens/s", "75%", "gated mlp", "time between two tokens, ms",
        "share of the read bandwidth, %", "time in one decode step, ms",
    ):  # fmt: skip
        assert drawn in parsed.text, drawn
    without = ParsedPage(page(report(full.rows[3])))
    assert not without.all("svg") and not without.all("table", "bars")


def test_the_slowest_percent_of_gaps_is_left_out_only_where_there_are_enough(full, report):
    def drawn(count):
        gaps = Samples(values=(*(20.0 + number / 100 for number in range(count - 1)), 500.0))
        return "400" in ParsedPage(page(report(row(inter_token_ms=gaps)))).text.split("All numbers")[0]

    assert drawn(50) and not drawn(200)


def test_what_is_left_out_of_the_charts_is_said(full, report):
    parts = full.rows[0].parts
    many = report(*(row(prompt_len=length, parts=parts) for length in range(1, 11)), row(prompt_len=11))
    text = " ".join(ParsedPage(page(many)).text.split())
    assert "2 more configurations are in the report’s JSON" in text
    assert "3 more configurations are in the table below" in text
    assert "more configurations" not in ParsedPage(page(full)).text


def test_conditions_and_warnings_are_folded_under_the_tables(full):
    parsed = ParsedPage(page(full))
    assert not any("open" in attributes for attributes in parsed.all("details"))
    folded = parsed.text.split("What the numbers depend on")[1]
    assert "1 warning" in folded and "spreads 20%" in folded and "load average0.5" in folded.replace("\n", "")
    assert "commitabc" in folded.replace("\n", "") and "torch2.13" in folded.replace("\n", "")


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_what_comes_from_outside_stays_text(full, report, text):
    def named(text):
        rows = [each.model_copy(update={"model": text, "engine": text, "reason": text}) for each in full.rows[:3]]
        kernel = full.kernels[0].model_copy(update={"model": text, "kernel": text, "shape": text})
        changed = {"device_name": text, "versions": {"torch": text or None}, "commit": text}
        whole = report(*rows, kernel)
        return whole.model_copy(update={"environment": whole.environment.model_copy(update=changed), "command": text})

    # JSON has no halves of surrogate pairs, so neither has a report from a file.
    text = text.replace("\ud83d", "")
    parsed, plain = (ParsedPage(page(named(each))) for each in (text, "plain"))
    if text:
        assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in plain.tags]
    assert text.replace("\x00", "\ufffd").replace("\r\n", "\n") in parsed.text.replace("\r\n", "\n")


def test_a_page_takes_no_drawing_library(full):
    code = "import sys, runtime.bench.html as h; from runtime.bench.records import Report; "
    code += "h.page(Report.model_validate_json(sys.stdin.read())); print('matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], input=full.to_json(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_the_table_reads_like_llama_bench(full):
    text = markdown(full, wide=True)
    prefill, decode = (line for line in text.splitlines() if line.startswith("| gemma-runtime") and "128" in line)
    cells = [cell.strip() for cell in decode.strip("|").split("|")]
    assert "pp128" in prefill and "1,270.00" in prefill
    # Tokens/s at the median TPOT of 21 ms, its spread, and the gaps: sorted 20, 21, 22, 90.
    assert cells[4:11] == ["tg64 @ d128", "47.62", "4.8%", "21.50", "69.60", "79.80", "20.0"]
    assert cells[10:13] == ["20.0", "80.0%", "1,234"]
    assert "of datasheet" not in text, "a column that nothing stands in"
    assert "hf-dynamic" in text and "75.0%" in text and "refused: 0 of 2" in text
    assert "warning: TPOT of hf-dynamic, bfloat16, tg64 @ d128 spreads 20% around its median" in text
    assert "warning: TPOT of gemma-runtime" not in text


def test_the_narrow_table_begins_with_a_headline(full):
    text = markdown(full)
    assert text.startswith("47.6 tokens/s, 80% of the read bandwidth, parity passed\n")
    (heading,) = (line for line in text.splitlines() if "| engine" in line)
    assert "of read" in heading and not any(name in heading for name in ("p90", "GB/s", "memory"))


def test_a_prompt_is_prefilled_once_whatever_follows(full):
    row = full.rows[0]
    longer = full.with_rows(row, row.model_copy(update={"gen_len": row.gen_len + 1}))
    ((_, lines),) = tables(longer).values()
    tests = [line[4] for line in lines]
    assert tests == ["pp128", "tg64 @ d128", "tg65 @ d128"]


def test_wide_spreads_are_one_warning(full):
    row = full.rows[0]
    noisy = Samples(values=(10.0, 20.0, 30.0))
    rows = [row.model_copy(update={"tpot_ms": noisy, "gen_len": length}) for length in (64, 65)]
    warnings = [line for line in markdown(full.with_rows(*rows)).splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: 2 times spread more than 10% around their medians")
    assert sum(line.startswith("warning") for line in markdown(full.with_rows(*rows), wide=True).splitlines()) == 2


def test_the_99th_percentile_needs_a_hundred_samples(full):
    row = full.rows[0]
    for count, shown in ((99, False), (100, True)):
        gaps = Samples(values=tuple(float(gap) for gap in range(1, count + 1)))
        ((heading, _),) = tables(full.with_rows(row.model_copy(update={"inter_token_ms": gaps}))).values()
        assert ("p99" in heading) == shown


def test_csv_holds_percentiles_and_samples(full):
    lines = list(csv.DictReader(io.StringIO(as_csv(full))))
    assert len(lines) == 6
    assert float(lines[0]["tpot_ms_p50"]) == 21.0 and lines[0]["tpot_ms_values"] == "20.0 21.0 22.0"
    assert lines[0]["audit_passed"] == "True" and lines[3]["tpot_ms_p50"] == "" and lines[5]["kernel"] == "gated_mlp"


def test_a_comparison_among_the_results_stands_in_the_report(full, tmp_path):
    (tmp_path / "compare-cpu.json").write_text(full.to_json())
    text = results.render(tmp_path)
    assert "## a <b>CPU</b> & more: `compare-cpu.json`" in text
    assert "tg64 @ d128" in text and "passed: 2 of 2 prompts" in text

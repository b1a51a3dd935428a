"""The page and the tables: what stands in them is what was measured, and nothing is fetched from anywhere."""

import csv
import io
import re

import pytest

from runtime.bench import report as results
from runtime.bench.html import page
from runtime.bench.records import Audit, Environment, KernelRow, Part, Report, Row, Samples
from runtime.bench.table import as_csv, markdown, row_table

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
    return lambda *rows: whole.with_rows(rows)


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
        Row(benchmark="compare", audit=refused, **skipped | {"dtype": "float16"}).refused(),
        KernelRow(
            audit=AUDIT, model="demo", dtype="bfloat16", kernel="gated_mlp", shape="1 x 640 -> 4096", bytes=5_000,
            time_us=Samples(values=(200.0, 210.0, 220.0)), torch_us=Samples(values=(420.0,)), achieved_gb_s=23.8,
            read_bandwidth_gb_s=25.0, share_of_read_bandwidth=0.95,
        ),
    )  # fmt: skip


def test_the_page_needs_nothing_else(full):
    html = page(full)
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|url\((?!#)", html)
    for name, value in re.findall(r'\b(href|src|xlink:href|action|data)="([^"]*)"', html):
        assert value.startswith("#"), (name, value)
    assert "no &lt;script&gt;vllm" in html and "a &lt;b&gt;CPU" in html
    assert html == page(full), "equal reports give equal pages"


def test_the_page_has_a_plot_of_everything_there_is(full, report):
    titles = re.findall(r"<h2>(.*?)</h2>", page(full))
    assert [title.replace("&#39;", "'") for title in titles] == [
        "Decoding against context",
        "Peers side by side",
        "Time between two tokens",
        "Where a token's time goes",
        "Kernels",
    ]
    assert page(full).count("<svg") == 5
    assert page(report(full.rows[3])).count("<svg") == 0
    for drawn in (
        "tokens/s",
        "bandwidth allows",
        "hf-dynamic",
        "75% equal",
        "gated_mlp",
        "time between two tokens, ms",
    ):
        assert drawn in page(full), drawn


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
    longer = full.with_rows([row, row.model_copy(update={"gen_len": row.gen_len + 1})])
    tests = [line[4] for line in row_table(longer)[1]]
    assert tests == ["pp128", "tg64 @ d128", "tg65 @ d128"]


def test_wide_spreads_are_one_warning(full):
    row = full.rows[0]
    noisy = Samples(values=(10.0, 20.0, 30.0))
    rows = [row.model_copy(update={"tpot_ms": noisy, "gen_len": length}) for length in (64, 65)]
    warnings = [line for line in markdown(full.with_rows(rows)).splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: 2 times spread more than 10% around their medians")
    assert sum(line.startswith("warning") for line in markdown(full.with_rows(rows), wide=True).splitlines()) == 2


def test_the_99th_percentile_needs_a_hundred_samples(full):
    row = full.rows[0]
    for count, shown in ((99, False), (100, True)):
        gaps = Samples(values=tuple(float(gap) for gap in range(1, count + 1)))
        heading, _ = row_table(full.with_rows([row.model_copy(update={"inter_token_ms": gaps})]))
        assert ("p99" in heading) == shown


def test_csv_holds_percentiles_and_samples(full):
    lines = list(csv.DictReader(io.StringIO(as_csv(full))))
    assert len(lines) == 6
    assert float(lines[0]["tpot_ms_p50"]) == 21.0 and lines[0]["tpot_ms_values"] == "20.0 21.0 22.0"
    assert lines[0]["audit_passed"] == "True" and lines[3]["tpot_ms_p50"] == "" and lines[5]["kernel"] == "gated_mlp"


def test_a_comparison_among_the_results_stands_in_the_report(full, tmp_path):
    (tmp_path / "compare-cpu.json").write_text(full.to_json())
    text = results.render(tmp_path, tmp_path / "plots")
    assert "## a <b>CPU</b> & more: `compare-cpu.json`" in text
    assert "tg64 @ d128" in text and "passed: 2 of 2 prompts" in text

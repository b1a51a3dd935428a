"""`bench diff`: what it calls faster, what it refuses to."""

import json
import random

import pytest

from runtime.bench.records import Environment, Report, Row, Samples
from runtime.cli import main as cli

ENVIRONMENT = Environment(
    device="cpu", device_name="a CPU", cores=2, threads=2, clocks_mhz=None, driver=None, datasheet_gb_s=None,
    load_average=0.5, versions={"torch": "2.13"}, commit="abc",
)  # fmt: skip


@pytest.fixture
def diff(tmp_path, capsys):
    """A function that prints the difference of two reports, given as {gen_len: TPOT samples, or none}."""

    def run(a, b, *options, **changed):
        paths = []
        for name, samples in (("a", a), ("b", b)):
            rows = [
                Row(
                    benchmark="latency",
                    engine="gemma-runtime",
                    model="demo",
                    dtype="float32",
                    batch_size=1,
                    prompt_len=8,
                    gen_len=gen_len,
                    status="ok" if values else "crashed",
                    tpot_ms=Samples(values=tuple(values)) if values else None,
                )
                for gen_len, values in samples.items()
            ]
            environment = ENVIRONMENT.model_copy(update=changed if name == "b" else {})
            report = Report(command="latency", time="2026-01-01T00:00:00Z", environment=environment).with_rows(*rows)
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(report.to_json())
        code = cli.main(["bench", "diff", *map(str, paths), *options])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def noisy(median, count=9, seed=0, spread=0.05):
    generator = random.Random(seed)
    return [median * (1 + spread * generator.uniform(-1, 1)) for _ in range(count)]


def test_says_which_is_faster(diff):
    code, out, _ = diff({16: noisy(10), 32: noisy(10)}, {16: noisy(8, seed=1), 32: noisy(13, seed=1)})
    faster, slower = (line for line in out.splitlines() if "gemma-runtime" in line)
    assert code == 1 and "B faster" in faster and "B slower" in slower
    assert "no difference" not in out


def test_says_no_difference_where_the_interval_holds_1(diff):
    code, out, _ = diff({16: noisy(10)}, {16: noisy(10, seed=1)})
    assert code == 0
    assert "no difference" in out and "B faster" not in out and "B slower" not in out


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({16: noisy(10)}, {16: noisy(8)}, 0),
        ({16: noisy(10), 17: noisy(10)}, {16: noisy(8), 17: noisy(10, seed=2)}, 0),
        ({16: noisy(10), 17: noisy(10)}, {16: noisy(8), 17: noisy(12)}, 1),
        ({16: noisy(10), 17: noisy(10)}, {16: noisy(10, seed=1), 17: []}, 1),
        ({16: noisy(10)}, {16: []}, 1),
        ({16: [10.0, 10.1]}, {16: [20.0, 20.1]}, 2),
        ({16: [10.0, 10.1], 17: noisy(10)}, {16: [20.0, 20.1], 17: noisy(10, seed=1)}, 0),
        ({16: []}, {16: noisy(10)}, 2),
    ],
    ids=["faster", "faster and the same", "one slower", "one crashed", "all crashed", "too few samples", "some too few",
         "nothing to compare with"],
)  # fmt: skip
def test_the_exit_code_is_the_verdict(diff, before, after, expected):
    code, out, _ = diff(before, after)
    assert code == expected
    assert ("no time in B" in out) == (expected == 1 and [] in after.values())


@pytest.mark.parametrize(("allowed", "expected"), [("0", 1), ("5%", 1), ("60%", 0), ("1000%", 0)])
def test_fails_where_the_whole_interval_is_above_the_bound(diff, allowed, expected):
    code, out, _ = diff({16: noisy(10)}, {16: noisy(13, seed=1)}, "--fail-above", allowed)
    assert code == expected and "B slower" in out


def test_an_interval_that_reaches_below_the_bound_passes(diff):
    samples = {16: noisy(10, spread=0.5)}, {16: noisy(13, seed=1, spread=0.5)}
    change = json.loads(diff(*samples, "--json")[1])["changes"][0]
    low, ratio = change["low"], change["ratio"]
    assert low < ratio
    code, _, _ = diff(*samples, "--fail-above", f"{100 * ((low + ratio) / 2 - 1)}%")
    assert code == 0


@pytest.mark.parametrize("given", ["-1%", "5 percent", "nan%", "1e9", ""])
def test_a_bound_that_is_no_percentage_is_bad_input(diff, given, capsys):
    with pytest.raises(SystemExit) as ended:
        diff({16: noisy(10)}, {16: noisy(10)}, f"--fail-above={given}")
    assert ended.value.code == 2 and "expected a percentage" in capsys.readouterr().err


def test_json_holds_what_the_table_does(diff):
    code, out, _ = diff({16: noisy(10), 17: noisy(10)}, {16: noisy(13, seed=1), 18: noisy(10)}, "--json", threads=4)
    found = json.loads(out)
    assert found["exit_code"] == code == 1
    (change,) = found["changes"]
    assert change["verdict"] == "B slower" and change["low"] > 1
    assert found["environments"] == ["threads: A 2, B 4"] and len(found["only_in"]) == 2 and found["lost"] == []


def test_markdown_lists_what_else_differs(diff):
    _, out, _ = diff({16: noisy(10)}, {16: noisy(10)}, "--markdown", threads=4)
    assert out.startswith("- threads: A 2, B 4\n\n| configuration")


@pytest.fixture
def report(tmp_path, diff):
    diff({16: noisy(10)}, {16: []})
    return tmp_path / "a.json", tmp_path / "b.json"


def test_a_report_is_exported_for_github_action_benchmark(report, tmp_path, capsys):
    code = cli.main(["bench", "export", str(report[0]), "--format", "github-action-benchmark"])
    (entry,) = json.loads(capsys.readouterr().out)
    assert code == 0 and entry["unit"] == "ms" and 9.5 < entry["value"] < 10.5
    assert entry["name"] == "latency: gemma-runtime, demo, float32, b1 pp8 tg16: TPOT"


@pytest.mark.parametrize(("form", "holds"), [("csv", "schema_version,"), ("html", "<!doctype html>")])
def test_a_report_is_exported_to_a_file(report, tmp_path, form, holds):
    out = tmp_path / "out"
    assert cli.main(["bench", "export", str(report[0]), "--format", form, "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8").startswith(holds)


def test_a_report_without_times_is_not_exported(report, capsys):
    assert cli.main(["bench", "export", str(report[1]), "--format", "github-action-benchmark"]) == 2
    assert "expected a report with times" in capsys.readouterr().err


def test_is_rarely_wrong_about_samples_of_one_machine(diff):
    """Pairs of reports of the same speed: 95 % intervals may miss 1 now and then."""
    rows = (
        {size: noisy(10, seed=size) for size in range(2, 102)},
        {size: noisy(10, seed=-size) for size in range(2, 102)},
    )
    _, out, _ = diff(*rows)
    assert out.count("no difference") >= 85


def test_does_not_judge_a_few_samples(diff):
    _, out, _ = diff({16: [10.0, 10.1]}, {16: [5.0, 5.1]})
    assert "too few samples: 2 and 2, expected 5 or more" in out and "faster" not in out


def test_names_what_else_differs(diff):
    _, out, _ = diff(
        {16: noisy(10), 17: noisy(10)}, {16: noisy(10), 18: noisy(10)}, threads=4, versions={"torch": "2.11"},
        load_average=3.0,
    )  # fmt: skip
    assert "threads: A 2, B 4" in out and "torch: A 2.13, B 2.11" in out and "load_average: A 0.5, B 3.0" in out
    assert "only in A: latency: gemma-runtime, demo, float32, b1 pp8 tg17" in out and "only in B" in out


def test_reports_without_anything_in_common_are_bad_input(diff):
    code, out, err = diff({16: noisy(10)}, {17: noisy(10)})
    assert code == 2 and not out and "none in common" in err

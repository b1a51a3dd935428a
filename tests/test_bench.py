"""The benchmark beside Hugging Face: what it reports, and that it gives no speed for wrong tokens."""

import json

import pytest

from runtime.bench import decode_vs_hf


def test_reports_both_sides_and_ends_with_json(tmp_path, capsys):
    kept = tmp_path / "new folder" / "result.json"
    assert decode_vs_hf.main(["--dtype", "bfloat16", "--tokens", "4", "--repeat", "2", "--out", str(kept)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(kept.read_text())
    (run,) = result["runs"]
    assert run["tokens_equal"] and run["new_tokens"] == 4
    for side in ("gemma-runtime", "Hugging Face"):
        assert len(run[side]["samples"]["tokens_per_s"]) == 2
        assert run[side]["tokens_per_s_median"] > 0 and run[side]["ttft_ms_median"] > 0
    medians = [run[side]["tokens_per_s_median"] for side in ("gemma-runtime", "Hugging Face")]
    assert run["decode_ratio"] == pytest.approx(medians[0] / medians[1])
    assert run["ceiling_tokens_per_s"] == pytest.approx(run["read_bandwidth_gb_s"] * 1e9 / run["bytes_per_token"])
    assert {"device", "threads", "torch", "transformers", "commit"} <= result["environment"].keys()


def test_gives_no_speed_where_tokens_differ(monkeypatch, capsys):
    honest = decode_vs_hf.Ours.run

    def wrong(self, ids, tokens):
        new, start, times = honest(self, ids, tokens)
        return [*new[:2], new[2] + 1, *new[3:]], start, times

    monkeypatch.setattr(decode_vs_hf.Ours, "run", wrong)
    with pytest.raises(SystemExit, match="tokens differ at 2") as stopped:
        decode_vs_hf.main(["--dtype", "bfloat16", "--tokens", "4", "--repeat", "1"])
    assert stopped.value.code not in (0, None)
    assert "tokens_per_s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "--tokens must be at least 2"),
        (["--dtype", "int8"], "got 'int8'"),
        (["--model", "nowhere"], "no model at nowhere"),
    ],
)
def test_bad_arguments_end_with_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        decode_vs_hf.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

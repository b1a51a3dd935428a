"""Values that overflow end a request with an error that names the dtype, and end no other row's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import runtime
from runtime.kernels.argmax import top_k

LONG, SHORT = [2, *range(10, 19)], [2, 9, 30]
COLUMN = 7
OPTIONS = {"max_new_tokens": 8, "ignore_eos": True}


def fresh(model, **changed):
    return dataclasses.replace(model, **changed)


def tokens_of(results):
    return [result.token_ids for result in results]


@pytest.fixture(params=[False, True], ids=["compiled", "eager"])
def overflowing(request, tiny):
    """A model whose residual is infinite wherever it takes in a certain token; a healthy one with the same logits
    otherwise; that token; and how many tokens an answer to LONG has up to it, where one to SHORT never has it.

    A column that the final norm mutes is beyond the dtype in the token's embedding.
    """
    limits = dataclasses.replace(tiny.runtime, eager=request.param)
    norm = tiny.weights.final_norm.clone()
    norm[COLUMN] = -1
    healthy = fresh(tiny, runtime=limits, weights=dataclasses.replace(tiny.weights, final_norm=norm))
    long, short = tokens_of(runtime.generate(healthy, [LONG, SHORT], **OPTIONS))
    kept, token = next(
        (at + 1, token) for at, token in enumerate(long) if at and token not in [*long[:at], *short, *LONG, *SHORT]
    )
    assert kept < len(long)
    embedding = healthy.weights.embedding.clone()
    embedding[token, COLUMN] = torch.finfo(embedding.dtype).max
    return fresh(healthy, weights=dataclasses.replace(healthy.weights, embedding=embedding)), healthy, token, kept


def test_a_row_that_overflows_ends_alone(overflowing):
    model, healthy, _, kept = overflowing
    expected = tokens_of(runtime.generate(healthy, [LONG, SHORT, SHORT], **OPTIONS))
    with runtime.stream(model, [LONG, SHORT, SHORT], **OPTIONS) as pieces:
        with pytest.raises(runtime.NonFiniteError, match=f"of token {kept} of prompt 0 are not finite"):
            for piece in pieces:
                assert piece.token_ids[0] >= 0
        results = pieces.results
    assert tokens_of(results) == [expected[0][:kept], *expected[1:]]
    assert [result.finish_reason for result in results] == [None, "length", "length"]
    with pytest.raises(runtime.NonFiniteError, match=f"of token {kept} of prompt 0, token {kept} of prompt 1"):
        runtime.generate(model, [LONG, LONG], **OPTIONS)
    assert runtime.generate(model, SHORT, **OPTIONS).token_ids == expected[1], "the model is as good as before"


def test_a_prompt_that_overflows_ends_before_its_first_token(overflowing):
    model, _, token, kept = overflowing
    for prompt in ([*SHORT, token], [token, *SHORT]):
        with pytest.raises(runtime.NonFiniteError, match="of token 0 are not finite in float32"):
            runtime.generate(model, prompt, **OPTIONS)
        with pytest.raises(runtime.NonFiniteError, match="after the prompt's 4 tokens"):
            runtime.inspect(model, prompt)
    with pytest.raises(runtime.NonFiniteError, match=f"of step {kept}"):
        runtime.inspect(model, LONG, steps=8)


@pytest.mark.parametrize(("dtype", "fix"), [("float16", 'dtype="bfloat16" or "float32"'), ("bfloat16", '"float32"')])
def test_the_error_names_the_dtype_and_the_fix(dtype, fix, tiny_folder, tmp_path, capsys):
    """The down projections are beyond what the dtype holds once they are summed."""
    from safetensors.torch import load_file, save_file

    from runtime.cli.main import main

    tensors = load_file(tiny_folder / "model.safetensors")
    for name in tensors:
        if "mlp." in name:
            tensors[name] *= 2e3 if dtype == "float16" else 1e14
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(runtime.NonFiniteError) as caught:
        runtime.generate(runtime.load(tmp_path, device="cpu", dtype=dtype, max_seq_len=64), "the dog", max_new_tokens=4)
    assert f"overflows {dtype}" in str(caught.value) and fix in str(caught.value)
    assert (
        main(
            [
                "generate",
                "the dog",
                "--model",
                str(tmp_path),
                "--dtype",
                dtype,
                "--max-new-tokens",
                "4",
                "--max-seq-len",
                "64",
            ]
        )
        == 2
    )
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "--dtype" in printed.err
    if dtype == "float16":
        assert (
            main(
                [
                    "generate",
                    "the dog",
                    "--model",
                    str(tmp_path),
                    "--dtype",
                    "bfloat16",
                    "--max-new-tokens",
                    "4",
                    "--max-seq-len",
                    "64",
                ]
            )
            == 0
        )


def test_lm_eval_scores_no_nan(overflowing):
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    from runtime.lm_eval.scoring import score

    model, _, token, _ = overflowing
    with pytest.raises(runtime.NonFiniteError, match="of a text to be scored"):
        score(model, [*SHORT, token], [[30]])
    assert score(model, SHORT, [[30]])[0][0] < 0


def test_top_k_has_a_nan_first():
    logits = torch.tensor([[1.0, torch.inf, -torch.nan, 3.0, torch.nan, -torch.inf]])
    assert top_k(logits, 6)[0].tolist() == [[2, 4, 1, 3, 0, 5]]

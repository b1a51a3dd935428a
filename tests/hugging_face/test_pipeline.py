"""transformers' own text-generation pipeline around a wrapped model."""

from __future__ import annotations

import logging

import pytest
import tokenizers
import transformers

from runtime.bench.small_models import VOCAB

# "abcdef" is what transformers' stop strings try a tokenizer with.
WORDS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "abcdef": 3, **{f"w{token}": token for token in range(4, VOCAB)}}


@pytest.fixture(scope="module")
def tokenizer():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


def made(model, tokenizer):
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_gives_what_it_gives_with_transformers_model(drop_in, tokenizer, batch_size, caplog):
    drop, texts = drop_in("gemma3"), ["w41 w52 w41", "w33 w41 w52 w67 w78"]
    arguments = {"do_sample": False, "max_new_tokens": 8, "batch_size": batch_size}
    with caplog.at_level(logging.WARNING):
        transformers.utils.logging.enable_propagation()
        answers = made(drop.ours, tokenizer)(texts, **arguments)
        transformers.utils.logging.disable_propagation()
    assert answers == made(drop.theirs, tokenizer)(texts, **arguments)
    assert "is not supported" not in caplog.text


def test_a_pipeline_ends_at_a_stop_string(drop_in, tokenizer):
    drop = drop_in("gemma3")
    plain = made(drop.ours, tokenizer)("w41 w52", do_sample=False, max_new_tokens=8, return_full_text=False)
    stop = plain[0]["generated_text"].split()[3]
    arguments = {"do_sample": False, "max_new_tokens": 8, "stop_sequence": stop, "return_full_text": False}
    answers = [made(model, tokenizer)("w41 w52", **arguments) for model in (drop.ours, drop.theirs)]
    assert answers[0] == answers[1]
    assert answers[0][0]["generated_text"].split()[-1] == stop


def test_a_text_streamer_prints_the_answer(drop_in, tokenizer, capsys):
    inputs = tokenizer("w41 w52", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    arguments = {"do_sample": False, "max_new_tokens": 8}
    printed = []
    for model in (drop_in("gemma3").ours, drop_in("gemma3").theirs):
        model.generate(**inputs, **arguments, streamer=transformers.TextStreamer(tokenizer, skip_prompt=True))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0].split()) == 8

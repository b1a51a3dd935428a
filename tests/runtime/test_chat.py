"""runtime.chat: the chat template, with one BOS."""

import dataclasses

import pytest

import runtime
from runtime.text.tokenizer import Tokenizer

MESSAGES = [
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "snow"},
    {"role": "user", "content": "and the snow"},
]
RENDERED = (
    "<start_of_turn>user\nthe dog<end_of_turn>\n<start_of_turn>assistant\nsnow<end_of_turn>\n"
    "<start_of_turn>user\nand the snow<end_of_turn>\n<start_of_turn>model\n"
)


def test_the_answer_continues_the_rendered_conversation(tiny):
    result = runtime.chat(tiny, MESSAGES, max_new_tokens=20)
    assert list(result.prompt_token_ids) == tiny.tokenizer.encode(RENDERED)
    assert result.prompt_token_ids.count(tiny.tokenizer.bos_id) == 1
    assert result.token_ids == runtime.generate(tiny, RENDERED, max_new_tokens=20).token_ids


def test_options_reach_generate(tiny):
    free = runtime.chat(tiny, MESSAGES, max_new_tokens=20, ignore_eos=True)
    assert len(free.token_ids) == 20
    stop = free.text[3:5]
    stopped = runtime.chat(tiny, MESSAGES, max_new_tokens=20, ignore_eos=True, stop=stop)
    assert stopped.text == free.text[: free.text.index(stop)]


def test_an_answer_can_be_streamed(tiny):
    ids = tiny.tokenizer.apply_chat(MESSAGES)
    text = "".join(piece.text for piece in runtime.stream(tiny, ids, max_new_tokens=20))
    assert text == runtime.chat(tiny, MESSAGES, max_new_tokens=20).text


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": "user"}], ValueError),
        (["the dog"], TypeError),
        ("the dog", TypeError),
        (None, TypeError),
        ([{"role": "user", "content": "the dog " * 200}], ValueError),
    ],
    ids=["no content", "not a mapping", "text", "none", "too long"],
)
def test_malformed_messages(tiny, messages, error):
    with pytest.raises(error):
        runtime.chat(tiny, messages)
    assert tiny.engine is None


def test_a_base_model_does_not_chat(tiny, tiny_folder):
    base = Tokenizer.from_folder(tiny_folder, tiny.config.vocab)
    base._chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        runtime.chat(dataclasses.replace(tiny, tokenizer=base), MESSAGES)


def test_a_model_without_tokenizer_does_not_chat(tiny):
    with pytest.raises(ValueError, match="has none"):
        runtime.chat(dataclasses.replace(tiny, tokenizer=None), MESSAGES)

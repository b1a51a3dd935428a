"""Ids and text equal Hugging Face's tokenizer; a stream of deltas is the text, whatever the ids."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoint.gguf.tokenizer import tokenizer_json
from runtime.errors import CheckpointError
from runtime.text.tokenizer import LONG_TEXT, Tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}\n"
    "    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}\n"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "Name a colour. "},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another ✨"},
]
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [*"▁abcdefgh\nmodeluser.<>", "▁▁", "ab", "cd", "▁a", "abcd", "mo", "del", "é"]
TOKENS = list(dict.fromkeys([*SPECIALS, *BYTES, *LETTERS]))
ID = {token: index for index, token in enumerate(TOKENS)}


def small_backend(**metadata: Any) -> tokenizers.Tokenizer:
    """A Gemma tokenizer of a few hundred tokens: every byte, few letters, some merges."""
    kinds = [3 if token in SPECIALS else 6 if token in BYTES else 1 for token in TOKENS]
    content = tokenizer_json(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": kinds,
            **{f"tokenizer.ggml.{name}_token_id": index for index, name in enumerate(("padding", "eos", "bos"))},
            **metadata,
        }
    )
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(small_backend(), len(TOKENS), {"bos_token": "<bos>"}, CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(demo_folder, 262144)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def demo_hf(demo_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_folder)


TEXT = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            ["  ", "\n", "\t", "▁", " the", "<bos>", "<end_of_turn>", "<unused7>", "<div>", "👩‍👩‍👧", "é", "日本"]
        )
        | st.characters(exclude_categories=["Cs"]),
        max_size=12,
    ).map("".join),
)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_encodes_as_transformers_does(demo: Tokenizer, demo_hf: Any, text: str) -> None:
    ids = demo.encode(text)
    assert ids == demo_hf(text)["input_ids"]
    assert ids[0] == demo.bos_id == 2


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 262143) | st.integers(0, 600), max_size=20))
def test_decodes_as_transformers_does(demo: Tokenizer, demo_hf: Any, ids: list[int]) -> None:
    assert demo.decode(ids) == demo_hf.decode(ids, skip_special_tokens=True)
    assert demo.decode(ids, skip_special_tokens=False) == demo_hf.decode(ids, skip_special_tokens=False)


def test_the_demo_tokenizer_needs_no_transformers(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert Tokenizer.from_folder(demo_folder, 262144) is not None


def test_the_demo_tokenizer_is_gemmas(demo: Tokenizer) -> None:
    ids = demo.encode("A dog running through the snow")
    assert ids == [2, 236776, 4799, 4710, 1343, 506, 7613]
    assert [demo.piece(token) for token in ids[1:]] == ["A", " dog", " running", " through", " the", " snow"]
    assert demo.decode(ids) == "A dog running through the snow"
    assert [demo.piece(token) for token in demo.encode("a\0  b")] == ["<bos>", "a", "<0x00>", "  ", "b"]
    assert demo.decode(demo.encode("  two  spaces\n\n\tkept ")) == "  two  spaces\n\n\tkept "


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_plain_text_survives_a_round_trip(demo: Tokenizer, text: str) -> None:
    plain = text.replace("▁", "").replace("<bos>", "").replace("<end_of_turn>", "").replace("<unused7>", "")
    if "<" not in plain:
        assert demo.decode(demo.encode(plain)) == plain


def test_an_image_is_no_text(demo: Tokenizer) -> None:
    """The demo continues some captions with one. Its file says that these tokens are a user's own words."""
    ids = [255999, 4799, 256000, 106, 6]
    assert demo.decode(ids) == " dog"
    assert demo.decode(ids, skip_special_tokens=False) == "<start_of_image> dog<end_of_image><end_of_turn><unused0>"
    assert demo.piece(255999) == "<start_of_image>"


def stream(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    decoder = tokenizer.incremental(skip_special_tokens)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@settings(max_examples=500, deadline=None)
@given(
    ids=st.lists(
        st.integers(0, len(TOKENS) - 1)
        | st.sampled_from([ID[byte] for byte in BYTES])
        | st.sampled_from([ID[token] for token in SPECIALS]),
        max_size=20,
    ),
    skip=st.booleans(),
)
def test_deltas_concatenate_to_the_decoding(small: Tokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(stream(small, ids, skip)) == small.decode(ids, skip)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=30))
def test_deltas_never_break_a_character(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    deltas = stream(small, ids)
    assert "".join(deltas) == small.decode(ids)
    if "\ufffd" not in small.decode(ids):
        assert all("\ufffd" not in delta for delta in deltas)


def test_an_emoji_of_several_tokens_comes_whole(small: Tokenizer) -> None:
    ids = small.encode("a👩‍👧b")
    assert len(ids) > 10
    assert [delta for delta in stream(small, ids) if delta] == ["a", "👩‍👧b"]


def test_a_skipped_token_does_not_split_a_character(small: Tokenizer) -> None:
    first, *rest = (ID[f"<0x{byte:02X}>"] for byte in "é".encode())
    assert "".join(stream(small, [first, ID["<pad>"], *rest])) == "é"
    shown = stream(small, [first, ID["<pad>"], *rest], skip_special_tokens=False)
    assert "".join(shown) == "\ufffd<pad>\ufffd"


def test_chat_has_the_templates_bos_and_no_other(small: Tokenizer) -> None:
    ids = small.apply_chat(MESSAGES[:1])
    assert ids.count(small.bos_id) == 1 and ids[0] == small.bos_id
    shown = small.decode(ids, skip_special_tokens=False)
    assert shown == "<bos><start_of_turn>user\nName a colour.<end_of_turn>\n<start_of_turn>model\n"
    named = {"bos_token": "<bos>"}
    without = Tokenizer(small_backend(), len(TOKENS), named, CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    doubled = Tokenizer(small_backend(), len(TOKENS), named, "{{ bos_token }}" + CHAT_TEMPLATE)
    assert without.apply_chat(MESSAGES[:1]) == ids[1:]
    assert doubled.apply_chat(MESSAGES[:1]) == [small.bos_id, *ids]


def test_chat_equals_transformers(demo: Tokenizer, demo_hf: Any) -> None:
    named = {"bos_token": "<bos>"}
    ours = Tokenizer(tokenizers.Tokenizer.from_str(demo_hf.backend_tokenizer.to_str()), 262144, named, CHAT_TEMPLATE)
    theirs = demo_hf.apply_chat_template(
        MESSAGES, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    assert ours.apply_chat(MESSAGES) == theirs


def test_chat_refusals(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="System role not supported"):
        small.apply_chat([{"role": "system", "content": "x"}])
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(small_backend(), len(TOKENS)).apply_chat(MESSAGES)
    with pytest.raises(TypeError, match="'role' and 'content'"):
        small.apply_chat(["user"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="refuses"):
        Tokenizer(small_backend(), len(TOKENS), {}, "{{ ''.__class__.__mro__ }}").apply_chat(MESSAGES)


def test_vocabularies_that_disagree(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{len(TOKENS)} tokens.*ends at 50"):
        Tokenizer(small_backend(), 50)
    with pytest.raises(ValueError, match="<start>"):
        _ = Tokenizer(small_backend(), len(TOKENS), {"bos_token": "<start>"}).bos_id
    assert Tokenizer(small_backend(), 400).vocab_size == 400  # rows of padding in the embedding table are fine


def test_an_added_token_past_the_vocabulary_is_refused_when_used() -> None:
    backend = small_backend()
    backend.add_special_tokens(["<image_soft_token>"])
    tokenizer = Tokenizer(backend, len(TOKENS))
    assert tokenizer.encode("abcd")
    with pytest.raises(ValueError, match="image_soft_token"):
        tokenizer.encode("ab<image_soft_token>")


def test_truncation_and_padding_in_the_file_are_ignored() -> None:
    backend = small_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    assert len(Tokenizer(backend, len(TOKENS)).encode("abababab")) == 5


def test_tokens_with_spaces_inside_keep_their_merges() -> None:
    tokens = [*TOKENS, "c d"]  # not a run of spaces: matched as it stands, so never, but it must not break the file
    kinds = [3 if token in SPECIALS else 6 if token in BYTES else 1 for token in tokens]
    backend = small_backend(**{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds})
    assert Tokenizer(backend, len(tokens)).encode("abcd c d") == Tokenizer(small_backend(), len(TOKENS)).encode(
        "abcd c d"
    )


def test_bad_text(small: Tokenizer) -> None:
    with pytest.raises(TypeError, match="bytes"):
        small.encode(b"ab")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="surrogate"):
        small.encode("a\ud800")


def test_folders_without_a_readable_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path, 99) is None
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json: make one with"):
        Tokenizer.from_folder(tmp_path, 99)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path, 99)


def test_the_ids_of_a_long_text_leave_other_threads_their_time():
    """Where the library keeps Python's lock, nobody else gets on for nearly all of it."""
    tokenizer = Tokenizer(small_backend(), len(TOKENS))
    long = "abcd mode é✨" * 30_000
    longest_s, over = [0.0], threading.Event()

    def watch():
        last_s = time.perf_counter()
        while not over.is_set():
            longest_s[0] = max(longest_s[0], (now_s := time.perf_counter()) - last_s)
            last_s = now_s

    thread = threading.Thread(target=watch)
    thread.start()
    began_s = time.perf_counter()
    ids = tokenizer.encode(long)
    took_s = time.perf_counter() - began_s
    over.set()
    thread.join()
    assert ids == small_backend().encode(long).ids and len(long) > LONG_TEXT
    assert longest_s[0] < took_s / 2

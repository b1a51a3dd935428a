"""The tokenizer made of a GGUF vocabulary: control tokens found, other vocabularies refused, giant tokens no burden."""

from __future__ import annotations

import collections
import itertools
import json
import random
import time
from typing import Any

import pytest
import tokenizers

from runtime.checkpoint.gguf.merges import merges
from runtime.checkpoint.gguf.quick_tokenizer import Merge, made, pairs_of, quick_json
from runtime.checkpoint.gguf.tokenizer import tokenizer_config, tokenizer_json
from runtime.errors import CheckpointError
from runtime.text.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused7>"]
PIECES = ["he", "ll", "hell", "▁he", "hello", "▁", "h", "e", "l", "o"]
TOKENS = [*SPECIALS, "<start_of_image>", *BYTES, "  ", *PIECES]
TYPES = [3] * len(SPECIALS) + [4] + [6] * 256 + [4] + [1] * len(PIECES)
SCORES = [-1000.0] * (len(TOKENS) - len(PIECES)) + [-float(rank) for rank in range(len(PIECES))]


def metadata(**changes: Any) -> dict[str, Any]:
    keys = {"model": "llama", "tokens": TOKENS, "token_type": TYPES, "scores": SCORES, "add_space_prefix": False}
    given = {f"tokenizer.ggml.{name}": value for name, value in (keys | changes).items()}
    return {key: value for key, value in given.items() if value is not None}


def encode(text: str, **changes: Any) -> list[str]:
    given = metadata(**changes)
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(given)))
    tokenizer = Tokenizer(backend, len(given["tokenizer.ggml.tokens"]), tokenizer_config(given))
    return [given["tokenizer.ggml.tokens"][token] for token in tokenizer.encode(text)]


def test_text_becomes_the_pieces_of_sentencepiece() -> None:
    assert encode("hello hello  é") == ["<bos>", "hello", "▁", "hello", "  ", "<0xC3>", "<0xA9>"]
    assert encode("hello", add_bos_token=False) == ["hello"]


@pytest.mark.parametrize("kind", [1, 2, 4, 5])
@pytest.mark.parametrize("token", [*SPECIALS, "<start_of_image>"])
def test_control_tokens_are_found_whatever_their_type(token: str, kind: int) -> None:
    types = [kind if text == token else given for text, given in zip(TOKENS, TYPES, strict=True)]
    assert encode(f"he{token}o", token_type=types)[-3:] == ["he", token, "o"]
    added = {entry["content"]: entry for entry in tokenizer_json(metadata(token_type=types))["added_tokens"]}
    typed = token == "<unused7>" and kind == 4  # said to be text of the user's own
    assert added[token]["special"] is not typed


def test_a_vocabulary_without_types_or_scores_has_its_control_tokens() -> None:
    for changes in ({"token_type": None, "scores": None}, {"scores": None}):
        assert encode("he<end_of_turn>hello", **changes) == ["<bos>", "he", "<end_of_turn>", "hello"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "byte-level BPE": ({"model": "gpt2"}, "must be 'llama', got 'gpt2'"),
    "no model": ({"model": None}, "must be 'llama', got None"),
    "no vocabulary": ({"model": "no_vocab", "tokens": None}, "no SentencePiece vocabulary"),
    "tokens no list": ({"tokens": "abc"}, "no SentencePiece vocabulary"),
    "tokens no text": ({"tokens": [1, 2]}, "no SentencePiece vocabulary"),
    "a token twice": ({"tokens": [*TOKENS[:-1], "he"]}, "'he' is in the vocabulary twice"),
    "two runs of spaces": ({"tokens": [*TOKENS[:-1], "▁▁"]}, "'▁▁' is in the vocabulary twice"),
    "too few types": ({"token_type": [1]}, r"token_type must have a number for each of 276 tokens, got 1"),
    "scores as text": ({"scores": ["1"] * len(TOKENS)}, "scores must have a number for each of 276 tokens"),
    "another order": ({"scores": [*SCORES[:-10], *range(10)]}, "scores must fall with each merge"),
    "no order": ({"scores": [0.0] * len(TOKENS)}, "scores must fall with each merge"),
    "not a number": ({"scores": [float("nan")] * len(TOKENS)}, "scores must fall with each merge"),
    "a space in front": ({"add_space_prefix": True}, "add_space_prefix must be false"),
    "an end of text": ({"add_eos_token": True}, "add_eos_token must be false"),
    "BOS or not": ({"add_bos_token": 3}, "add_bos_token must be true or false, got 3"),
    "BOS past the end": ({"bos_token_id": 276}, "bos_token_id must be an id of the vocabulary, below 276, got 276"),
    "unknown past the end": ({"unknown_token_id": 1 << 40}, "unknown_token_id must be an id"),
    "an empty BOS": (
        {"tokens": [*TOKENS, ""], "token_type": None, "scores": None, "bos_token_id": 276},
        "an empty token",
    ),
    "no BOS": ({"tokens": ["a", "b"], "token_type": None, "scores": None}, "nor a token '<bos>'"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_gemmas_is_refused_by_name(fault: str) -> None:
    changes, message = REFUSED[fault]
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_json(metadata(**changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("bos", ["  ", "<0x41>", "he"])
def test_any_token_may_be_the_bos(bos: str) -> None:
    assert encode("o", bos_token_id=TOKENS.index(bos)) == [bos, "o"]


def test_merges_are_every_split_into_two_tokens() -> None:
    found = tokenizer_json(metadata())["model"]["merges"]
    ids = {token: index for index, token in enumerate([token if token != "  " else "▁▁" for token in TOKENS])}
    naive = [[t[:cut], t[cut:]] for t in ids for cut in range(len(t) - 1, 0, -1) if t[:cut] in ids and t[cut:] in ids]
    assert [merge.split(" ") for merge in found] == naive and len(naive) == 6


def bpe(merges: list[Merge], tokens: list[str]) -> tokenizers.Tokenizer:
    ids = {token: index for index, token in enumerate(tokens)}
    return tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))


@pytest.mark.newest_only
@pytest.mark.parametrize("seed", range(4))
def test_merges_that_no_text_has_are_left_out(seed: int) -> None:
    """All texts of a few letters have the ids that every merge gives, and lose them without one that was chosen among
    its token's. Merges come in any order, that of the tokens too."""
    draw = random.Random(seed)
    longer = ["".join(letters) for length in range(2, 6) for letters in itertools.product("ab", repeat=length)]
    tokens = ["a", "b", *draw.sample(longer, 50)]
    every = pairs_of(merges(tokens, dict.fromkeys(tokens, 0)))
    if seed % 2:
        draw.shuffle(every)
    kept = made(every)
    texts = ["".join(letters) for length in range(1, 9) for letters in itertools.product("ab", repeat=length)]

    def encoded(merges: list[Merge]) -> list[list[int]]:
        return [each.ids for each in bpe(merges, tokens).encode_batch(texts)]

    assert encoded(kept) == encoded(every)
    before, after = (collections.Counter(map("".join, some)) for some in (every, kept))
    chosen = [merge for merge in kept if after["".join(merge)] < before["".join(merge)]]
    assert chosen and all(after["".join(merge)] == 1 for merge in chosen)
    for merge in chosen:
        assert encoded([other for other in kept if other != merge]) != encoded(every), merge


def test_a_byte_or_the_unknown_token_may_begin_a_merge() -> None:
    """Where a character has no token, and a token's text has that of the one which stands for it."""
    for whole in ("<0x41>", "[UNK]"):  # made of its characters up to the last, which is made with what follows
        splits = [whole[:end] for end in range(2, len(whole))]
        tokens = ["<bos>", *dict.fromkeys((*whole, "b")), *splits, f"{whole[-1]}b", whole, f"{whole}b"]
        unknown = tokens.index(whole)
        keys = {"tokens": tokens, "token_type": None, "scores": None, "eos_token_id": 0, "padding_token_id": 0}
        written = tokenizer_json(metadata(**keys, bos_token_id=0, unknown_token_id=unknown))
        every, quick = (tokenizers.Tokenizer.from_str(text) for text in (json.dumps(written), quick_json(written)))
        assert every.encode("AbA").tokens == quick.encode("AbA").tokens == ["<bos>", f"{whole}b", whole]


def test_a_file_that_is_written_for_its_parser_holds_the_same_tokenizer() -> None:
    written = tokenizer_json(metadata())
    quick = json.loads(quick_json(written))
    assert quick["model"]["vocab"] == written["model"]["vocab"]
    assert list(quick["model"]["vocab"]) == sorted(written["model"]["vocab"], reverse=True)
    assert pairs_of(quick["model"]["merges"]) == made(pairs_of(written["model"]["merges"]))
    for tokenizer in (written, quick):
        del tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    assert quick == written


@pytest.mark.parametrize("giants", [["x" * 10**6], ["x" * length for length in range(90_000, 90_300)]])
def test_giant_tokens_cost_little(giants: list[str]) -> None:
    started = time.process_time()
    written = tokenizer_json(metadata(tokens=TOKENS + giants, token_type=TYPES + [1] * len(giants), scores=None))
    assert (
        len(json.loads(quick_json(written))["model"]["merges"]) <= len(written["model"]["merges"]) == 6
        and time.process_time() - started < 3
    )


def test_too_many_long_tokens_are_refused_at_once() -> None:
    started = time.process_time()
    for count, step in ((2000, 1), (900, 3)):
        giants = ["x" * length for length in range(step, count * step, step)]
        many = TOKENS + giants + [f"{index:02700d}" for index in range(10_000)]
        with pytest.raises(CheckpointError, match=r"different lengths|too many long tokens"):
            tokenizer_json(metadata(tokens=many, token_type=None, scores=None))
    assert time.process_time() - started < 5


def test_chat_templates_are_kept_by_name() -> None:
    assert "chat_template" not in tokenizer_config(metadata())
    one = metadata() | {"tokenizer.chat_template": "{{ bos_token }}"}
    assert tokenizer_config(one)["chat_template"] == "{{ bos_token }}"
    two = one | {"tokenizer.chat_template.tool_use": "x", "tokenizer.chat_templates": ["tool_use"]}
    named = [{"name": "default", "template": "{{ bos_token }}"}, {"name": "tool_use", "template": "x"}]
    assert tokenizer_config(two)["chat_template"] == named
    with pytest.raises(CheckpointError, match="'tool_use' of the GGUF file is not text"):
        tokenizer_config(one | {"tokenizer.chat_template.tool_use": 3})

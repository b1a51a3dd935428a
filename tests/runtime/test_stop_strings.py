"""Answers end at a stop string where transformers' `stop_strings` end them, and their text is cut before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runtime
from runtime.engine.answer import Answer
from runtime.errors import InvalidArgument

PROMPT = [2, 270, 275, 268]


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> tuple[Any, Any]:
    """The tiny checkpoint in transformers: model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def ours(tiny_folder: Path) -> Any:
    return runtime.load(tiny_folder, device="cpu", max_seq_len=128, progress=False)


def answer_to(
    tokenizer: Any, prompt: list[int], ids: list[int], stops: list[str], skip_special_tokens: bool = True
) -> tuple[Answer, str]:
    """The answer that takes these ids until it ends, and its pieces' text."""
    answer = Answer(0, tokenizer, len(ids), stop_strings=stops, prompt=prompt, skip_special_tokens=skip_special_tokens)
    pieces = []
    for token in ids:
        pieces.append(answer.take(token).text)
        if answer.finish_reason:
            break
    return answer, "".join(pieces)


def text_before(tokenizer: Any, prompt: list[int], ids: list[int], stops: list[str], skip_special_tokens: bool) -> str:
    """What is to be kept of an answer that ends at a stop string: the tokens before it, and what the token in which it
    begins says before it."""
    spelled = [tokenizer.bytes_of(token) for token in prompt + ids]
    start_of_last, whole = sum(map(len, spelled[:-1])), b"".join(spelled)
    ends = []
    for stop in (stop.encode() for stop in stops):
        at = whole.find(stop, max(0, start_of_last + 1 - len(stop)))
        ends += [(at + len(stop), at)] if at >= 0 else []
    cut, position, kept = min(ends)[1], sum(map(len, spelled[: len(prompt)])), []
    for token, piece in zip(ids, spelled[len(prompt) :], strict=True):
        if position + len(piece) > cut:
            is_text = tokenizer.decode([token], skip_special_tokens)
            shown = piece[: max(0, cut - position)].decode() if is_text else ""
            return tokenizer.decode(kept, skip_special_tokens) + shown
        kept.append(token)
        position += len(piece)
    raise AssertionError("the stop string does not end in the last token")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokens_end_where_transformers_ends_them(
    theirs: tuple[Any, Any], ours: Any, one_thread: None, data: st.DataObject
) -> None:
    """Stop strings cut from what the tokens spell, of any length, from anywhere, the prompt's end included."""
    from transformers.generation.stopping_criteria import StopStringCriteria

    tokenizer = ours.tokenizer
    # Special tokens, bytes (those of "é" and "雪" among them, in order) and text.
    some = st.lists(
        st.one_of(
            st.integers(0, 5).map(lambda token: [token]),
            st.integers(6, 261).map(lambda token: [token]),
            st.sampled_from(["é", "雪", "👩", "a"]).map(lambda text: [6 + byte for byte in text.encode()]),
            st.integers(262, ours.config.vocab - 1).map(lambda token: [token]),
        ),
        min_size=1,
        max_size=8,
    ).map(lambda groups: [token for group in groups for token in group])
    prompt, ids = data.draw(some), data.draw(some)
    spelled = b"".join(tokenizer.bytes_of(token) for token in prompt + ids).decode("utf-8", "ignore")
    piece = st.tuples(st.integers(0, len(spelled)), st.integers(1, 20)).map(lambda at: spelled[at[0] : sum(at)])
    stops = data.draw(st.lists(piece | st.text("abc<>_endofturn", max_size=3), min_size=1, max_size=3))
    stops = [stop for stop in stops if stop] or ["a"]

    criterion = StopStringCriteria(theirs[1], stops)
    lengths = (
        count for count in range(1, len(ids) + 1) if bool(criterion(torch.tensor([prompt + ids[:count]]), None)[0])
    )
    ends = next(lengths, None)
    skip = data.draw(st.booleans(), "skip_special_tokens")
    answer, text = answer_to(tokenizer, prompt, ids, stops, skip)
    assert text == answer.text
    if ends is None:
        assert (answer.finish_reason, answer.token_ids) == ("length", ids)
        assert text == tokenizer.decode(ids, skip)
    else:
        assert (answer.finish_reason, answer.token_ids) == ("stop", ids[:ends])
        assert text == text_before(tokenizer, prompt, ids[:ends], stops, skip)


@pytest.mark.parametrize("seed", range(6))
def test_generates_what_transformers_generates(theirs: tuple[Any, Any], ours: Any, seed: int) -> None:
    """Stop strings cut from what the model writes, special tokens and the prompt's last letters included."""
    model, tokenizer = theirs
    random = torch.Generator().manual_seed(seed)
    prompt = [2, *torch.randint(262, ours.config.vocab, (5,), generator=random).tolist()]
    free = runtime.generate(ours, prompt, max_new_tokens=40, ignore_eos=True)
    written = tokenizer.decode([*prompt[-2:], *free.token_ids])
    for _ in range(6):
        at, length = (int(torch.randint(0, top, (), generator=random)) for top in (len(written), 8))
        stop = written[at : at + length + 1].replace("\ufffd", "") or "a"
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=None,
            stop_strings=stop,
            tokenizer=tokenizer,
        )[0, len(prompt) :].tolist()
        got = runtime.generate(ours, prompt, max_new_tokens=40, ignore_eos=True, stop=stop)
        assert list(got.token_ids) == expected, stop


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text)[1:]


@pytest.mark.parametrize(
    ("prompt", "answer", "stops", "tokens", "text"),
    [
        ("", "the dog<end_of_turn>snow", ["<end_of_turn>"], "the dog<end_of_turn>", "the dog"),
        ("", "the dog<end_of_turn>snow", ["g<end_of_turn>s"], "the dog<end_of_turn>s", "the do"),
        ("", "the dog<end_of_turn>snow", ["turn"], "the dog<end_of_turn>", "the dog"),
        ("", "the dog<end_of_turn>snow", ["og<end"], "the dog<end_of_turn>", "the d"),
        ("", "<bos>the<bos><bos>dog", ["<bos><bos>"], "<bos>the<bos><bos>", "the"),
        ("the", " dog snow", ["e dog"], " dog", ""),
        ("the dog", " snow", ["dog"], " snow", " snow"),
        ("the do", "gs", ["dog"], "g", ""),
        ("", "a雪b", ["雪"], "a雪", "a"),
        ("", "aéxb", ["éx"], "aéx", "a"),
        ("", "abc", ["bc", "abc", "c"], "abc", ""),
        ("", "abcd", ["bcd", "c"], "abc", "ab"),
        ("", "aab", ["ab"], "aab", "a"),
    ],
)
def test_where_an_answer_ends(ours: Any, prompt: str, answer: str, stops: list[str], tokens: str, text: str) -> None:
    before, ids = ids_of(ours.tokenizer, prompt), ids_of(ours.tokenizer, answer)
    got, pieces = answer_to(ours.tokenizer, before, ids, stops)
    assert got.token_ids == ids_of(ours.tokenizer, tokens)
    assert got.text == pieces == text


def test_a_stop_token_that_completes_a_stop_string(ours: Any) -> None:
    ids = ids_of(ours.tokenizer, "the dog<end_of_turn>")
    answer = Answer(0, ours.tokenizer, 50, stop_ids=[ids[-1]], stop_strings=["dog<end_of_turn>"])
    for token in ids:
        answer.take(token)
    assert (answer.finish_reason, answer.token_ids, answer.text) == ("stop", ids, "the ")


@pytest.mark.parametrize(
    ("answer", "stops", "text"),
    [
        ("the<bos> dog<end_of_turn>", [], "the<bos> dog<end_of_turn>"),
        ("the<bos> dog<end_of_turn>", ["snow"], "the<bos> dog<end_of_turn>"),
        ("the<bos> dog<end_of_turn>", ["<end_of_turn>"], "the<bos> dog"),
        ("the<bos> dog<end_of_turn>", ["_turn>"], "the<bos> dog<end_of"),
        ("the<bos> dog", ["os> d"], "the<b"),
    ],
)
def test_special_tokens_are_text_where_they_are_asked_for(ours: Any, answer: str, stops: list[str], text: str) -> None:
    """A stop token too, as in transformers' `decode(ids, skip_special_tokens=False)`."""
    ids = ids_of(ours.tokenizer, answer)
    stop_ids = ids_of(ours.tokenizer, "<end_of_turn>")
    growing = Answer(0, ours.tokenizer, 50, stop_ids, stops, skip_special_tokens=False)
    pieces = []
    for token in ids:
        pieces.append(growing.take(token).text)
        if growing.is_over:
            break
    assert "".join(pieces) == growing.text == text


def test_what_is_held_back_comes_at_the_end(ours: Any) -> None:
    ids = ids_of(ours.tokenizer, "the dog")
    answer = Answer(0, ours.tokenizer, len(ids), stop_strings=["the dogs", "dog<end_of_turn>"])
    pieces = [answer.take(token).text for token in ids]
    assert pieces[:-1] == [""] * (len(ids) - 1) and pieces[-1] == answer.text == "the dog"


def test_half_a_character_is_no_stop_string(ours: Any) -> None:
    with pytest.raises(InvalidArgument, match="surrogate"):
        runtime.generate(ours, "the dog", stop="\ud800")

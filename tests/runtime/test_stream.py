"""runtime.stream: pieces, early ends, and who holds the model."""

import gc
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runtime
from runtime.engine.answer import Answer

PROMPTS = ["the dog", "A", "snow on the dog, and the dog on the snow again and again"]


def test_pieces_add_up_to_the_result(tiny):
    expected = runtime.generate(tiny, "the dog", max_new_tokens=60, ignore_eos=True)
    pieces = runtime.stream(tiny, "the dog", max_new_tokens=60, ignore_eos=True)
    got = list(pieces)
    assert "".join(piece.text for piece in got) == expected.text
    assert tuple(token for piece in got for token in piece.token_ids) == expected.token_ids
    assert {piece.index for piece in got} == {0}
    (result,) = pieces.results
    assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
    assert result.stats.new_tokens == 60


def test_rows_of_a_batch_take_turns(tiny):
    expected = runtime.generate(tiny, PROMPTS, max_new_tokens=30)
    texts = [""] * len(PROMPTS)
    for piece in runtime.stream(tiny, PROMPTS, max_new_tokens=30):
        texts[piece.index] += piece.text
    assert texts == [result.text for result in expected]


def test_nothing_runs_before_the_first_piece_is_asked_for(tiny):
    pieces = runtime.stream(tiny, "the dog", max_new_tokens=5)
    assert tiny.engine is None
    assert pieces.results[0].token_ids == ()
    assert runtime.generate(tiny, "A", max_new_tokens=5).token_ids, "an unread stream holds nothing"
    assert len(list(pieces)) == 5


@pytest.mark.parametrize("read", [0, 1, 2, 20])
@pytest.mark.parametrize("end", ["close", "with", "forget", "error"])
def test_an_early_end_leaves_the_model_to_the_next_call(tiny, read, end):
    expected = runtime.generate(tiny, "the dog", max_new_tokens=40, ignore_eos=True)
    pieces = runtime.stream(tiny, PROMPTS[2], max_new_tokens=40, ignore_eos=True)
    for _ in range(read):
        next(pieces)
    if end == "close":
        pieces.close()
        pieces.close()
        assert list(pieces) == []
    elif end == "with":
        with pieces:
            pass
    elif end == "error":
        with pytest.raises(ZeroDivisionError), pieces:
            raise ZeroDivisionError
    else:
        del pieces
        gc.collect()
    assert runtime.generate(tiny, "the dog", max_new_tokens=40, ignore_eos=True).token_ids == expected.token_ids


def test_a_closed_stream_keeps_what_has_come(tiny):
    expected = runtime.generate(tiny, "the dog", max_new_tokens=40, ignore_eos=True)
    with runtime.stream(tiny, "the dog", max_new_tokens=40, ignore_eos=True) as pieces:
        text = "".join(next(pieces).text for _ in range(7))
    (result,) = pieces.results
    assert (result.text, result.token_ids) == (text, expected.token_ids[:7])
    assert result.finish_reason is None
    assert expected.text.startswith(text)


def test_an_open_stream_holds_up_nobody(tiny):
    expected = [runtime.generate(tiny, prompt, max_new_tokens=20, ignore_eos=True).token_ids for prompt in PROMPTS]
    with runtime.stream(tiny, PROMPTS[0], max_new_tokens=20, ignore_eos=True) as pieces:
        got = [next(pieces).token_ids[0]]
        inspected = runtime.inspect(tiny, PROMPTS[1], steps=3)
        assert tuple(step.id for step in inspected.steps) == expected[1][:3]
        others = [runtime.stream(tiny, prompt, max_new_tokens=20, ignore_eos=True) for prompt in PROMPTS[1:]]
        answers = [[next(other).token_ids[0]] for other in others]
        threads = [threading.Thread(target=lambda: runtime.generate(tiny, "A", max_new_tokens=9)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "one that nobody reads is in nobody's way"
        for one, other in zip(answers, others, strict=True):
            one.extend(piece.token_ids[0] for piece in other)
        got.extend(piece.token_ids[0] for piece in pieces)
    assert [tuple(one) for one in (got, *answers)] == expected


def test_a_stream_may_be_finished_by_another_thread(tiny):
    pieces = runtime.stream(tiny, "the dog", max_new_tokens=20, ignore_eos=True)
    first, rest = next(pieces), []
    other = threading.Thread(target=lambda: rest.extend(pieces))
    other.start()
    other.join()
    assert len([first, *rest]) == 20
    assert runtime.generate(tiny, "A", max_new_tokens=2).token_ids


def test_two_models_stream_side_by_side(tiny, tiny_folder):
    other = runtime.load(tiny_folder, device="cpu", max_seq_len=128, progress=False)
    expected = [runtime.generate(tiny, prompt, max_new_tokens=20, ignore_eos=True).token_ids for prompt in PROMPTS[:2]]
    streams = [
        runtime.stream(model, prompt, max_new_tokens=20, ignore_eos=True)
        for model, prompt in zip((tiny, other), PROMPTS, strict=False)
    ]
    pairs = list(zip(*streams, strict=True))
    assert [tuple(piece.token_ids[0] for piece in row) for row in zip(*pairs, strict=True)] == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(max_size=20), broken=st.lists(st.integers(6, 261), max_size=6), stop=st.text(max_size=3))
def test_no_piece_breaks_a_character_whatever_the_tokens(tiny, text, broken, stop):
    """Texts that the tokenizer spells in bytes for the most part, then bytes at random."""
    ids = [*tiny.tokenizer.encode(text)[1:], *broken, 270]
    stop = "" if broken else stop  # which is found in bytes, though a broken character follows
    answer = Answer(0, tiny.tokenizer, len(ids), stop_strings=[stop] if stop else [])
    pieces = []
    for token in ids:
        pieces.append(answer.take(token))
        if answer.finish_reason:
            break
    whole = tiny.tokenizer.decode(ids)
    at = whole.find(stop) if stop else -1
    assert "".join(piece.text for piece in pieces) == answer.text == (whole if at < 0 else whole[:at])
    assert answer.finish_reason == ("length" if at < 0 else "stop")
    if not broken:
        assert "\ufffd" not in answer.text.replace("\ufffd" if "\ufffd" in text else "\0", "")

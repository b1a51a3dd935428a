"""runtime.generate: results, batches, how answers end, bad input, and callers that meet."""

import dataclasses
import json
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

import runtime
from runtime.engine import decode
from runtime.text.stop_strings import StopStrings

PROMPTS = ["the dog", "A", "snow on the dog, and the dog on the snow again and again", "雪é"]


def variant(model, **config):
    """The same weights under another configuration, with a turn and a state of its own."""
    config = dataclasses.replace(model.config, **config)
    return dataclasses.replace(model, config=config)


def tokens_of(results):
    return [result.token_ids for result in results]


def test_result(tiny):
    result = runtime.generate(tiny, "the dog", max_new_tokens=40, ignore_eos=True)
    assert len(set(result.token_ids)) >= 8, "the model must wander for these tests to mean something"
    assert result.text == tiny.tokenizer.decode(result.token_ids)
    assert list(result.prompt_token_ids) == tiny.tokenizer.encode("the dog")
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 40
    assert runtime.generate(tiny, result.prompt_token_ids, max_new_tokens=40, ignore_eos=True).text == result.text


def test_special_tokens_are_text_on_request(tiny):
    free = runtime.generate(tiny, "the dog", max_new_tokens=40, ignore_eos=True)
    stop = next(token for token in free.token_ids[5:] if tiny.tokenizer.decode([token]).strip())
    model = variant(tiny, stop_token_ids=(stop,))
    plain = runtime.generate(model, "the dog", max_new_tokens=40)
    with runtime.stream(model, "the dog", max_new_tokens=40, skip_special_tokens=False) as pieces:
        text = "".join(piece.text for piece in pieces)
    (shown,) = pieces.results
    assert shown.token_ids == plain.token_ids and shown.token_ids[-1] == stop
    assert shown.text == text == tiny.tokenizer.decode(shown.token_ids, skip_special_tokens=False)
    assert plain.text == tiny.tokenizer.decode(plain.token_ids[:-1])
    with pytest.raises(TypeError, match="skip_special_tokens must be True or False, got 'no'"):
        runtime.generate(tiny, "the dog", skip_special_tokens="no")


def test_a_result_shows_itself(tiny):
    result = runtime.generate(tiny, "the dog", max_new_tokens=40, ignore_eos=True)
    first = ", ".join(map(str, result.token_ids[:8]))
    assert repr(result).startswith(f"GenerationResult(text={result.text!r}, token_ids=({first}, … 40 in all)")
    assert "finish_reason='length'" in repr(result) and str(result.stats) in repr(result)
    page = dataclasses.replace(result, text="<b>&")._repr_html_()
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page and "40 new tokens" in page and "length" in page
    assert "no text" in dataclasses.replace(result, text="")._repr_html_()


def test_the_same_call_gives_the_same_tokens_on_a_reused_state(tiny):
    first = runtime.generate(tiny, "the dog", max_new_tokens=40)
    state = tiny.engine.state
    runtime.generate(tiny, PROMPTS[2], max_new_tokens=50)
    assert runtime.generate(tiny, "the dog", max_new_tokens=40).token_ids == first.token_ids
    assert tiny.engine.state is state, "buffers are made once"


def test_stats(tiny):
    stats = runtime.generate(tiny, "the dog", max_new_tokens=9, ignore_eos=True).stats
    assert (stats.prompt_tokens, stats.new_tokens) == (len(tiny.tokenizer.encode("the dog")), 9)
    assert stats.ttft_s > 0 and stats.decode_s > 0
    assert stats.decode_tokens_per_s == pytest.approx(8 / stats.decode_s)
    # 8 decode steps from 8 cached tokens: on average each attends to 8 + 9 / 2 of them.
    assert stats.bytes_per_token == tiny.plan.bytes_per_token(stats.prompt_tokens + 4)
    assert stats.bandwidth_gb_s == pytest.approx(stats.bytes_per_token * 8 / stats.decode_s / 1e9)


def test_a_batch_shares_each_reading_of_the_weights(tiny):
    alone = runtime.generate(tiny, "the dog", max_new_tokens=9, ignore_eos=True).stats
    batch = runtime.generate(tiny, ["the dog"] * 4, max_new_tokens=9, ignore_eos=True)[0].stats
    assert batch.new_tokens == 4 * 9
    cache = alone.bytes_per_token - tiny.plan.weights
    assert batch.bytes_per_token == tiny.plan.weights // 4 + cache


def test_one_token_has_no_decode_speed(tiny):
    stats = runtime.generate(tiny, "the dog", max_new_tokens=1).stats
    assert stats.ttft_s > 0
    assert (stats.decode_s, stats.decode_tokens_per_s, stats.bandwidth_gb_s) == (None, None, None)
    assert "tokens/s" not in str(stats)


def test_no_tokens_asked_for(tiny):
    result = runtime.generate(tiny, "the dog", max_new_tokens=0)
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "length")
    assert result.stats.ttft_s is None
    assert tiny.engine is None


@pytest.mark.parametrize("ids", [False, True], ids=["texts", "ids"])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_each_row_of_a_batch_gets_what_it_gets_alone(tiny, ids, ignore_eos):
    prompts = [tiny.tokenizer.encode(text) for text in PROMPTS] if ids else PROMPTS
    alone = [runtime.generate(tiny, prompt, max_new_tokens=60, ignore_eos=ignore_eos) for prompt in prompts]
    together = runtime.generate(tiny, prompts, max_new_tokens=60, ignore_eos=ignore_eos)
    assert len({len(ids) for ids in (result.prompt_token_ids for result in together)}) > 1
    for one, row in zip(alone, together, strict=True):
        assert dataclasses.replace(row, stats=one.stats) == one


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(0, 298), min_size=1, max_size=70), min_size=1, max_size=4), st.integers(1, 30))
def test_rows_of_any_ids_and_lengths(tiny, prompts, length):
    """Shorter and longer than the window of 16, in the prompt and after it."""
    alone = [runtime.generate(tiny, prompt, max_new_tokens=length).token_ids for prompt in prompts]
    assert tokens_of(runtime.generate(tiny, prompts, max_new_tokens=length)) == alone


def test_rows_end_each_at_its_own_step(tiny):
    free = tokens_of(runtime.generate(tiny, PROMPTS, max_new_tokens=60, ignore_eos=True))
    stops = tuple({row[at] for row, at in zip(free, (3, 17, 30), strict=False)})
    stopping = variant(tiny, stop_token_ids=stops)
    results = runtime.generate(stopping, PROMPTS, max_new_tokens=60)
    lengths = [next((at for at, token in enumerate(row, 1) if token in stops), 60) for row in free]
    assert len(set(lengths)) >= 3
    assert tokens_of(results) == [row[:length] for row, length in zip(free, lengths, strict=True)]
    assert [result.finish_reason for result in results] == ["stop" if length < 60 else "length" for length in lengths]
    assert results[0].stats.new_tokens == sum(lengths)


def test_a_batch_of_one_is_a_batch(tiny):
    (row,) = runtime.generate(tiny, ["the dog"], max_new_tokens=5)
    assert row.token_ids == runtime.generate(tiny, "the dog", max_new_tokens=5).token_ids


def test_a_stop_token_is_kept_and_its_text_is_not(tiny):
    free = runtime.generate(tiny, "the dog", max_new_tokens=40, ignore_eos=True)
    length = next(at for at in range(10, 40) if free.token_ids[at] not in free.token_ids[:at])
    stopping = variant(tiny, stop_token_ids=(7, free.token_ids[length]))
    result = runtime.generate(stopping, "the dog", max_new_tokens=40)
    assert result.token_ids == free.token_ids[: length + 1]
    assert result.text == tiny.tokenizer.decode(free.token_ids[:length])
    assert result.finish_reason == "stop"
    ignoring = runtime.generate(stopping, "the dog", max_new_tokens=40, ignore_eos=True)
    assert ignoring.token_ids == free.token_ids


def test_the_first_token_may_be_the_stop_token(tiny):
    first = runtime.generate(tiny, "the dog", max_new_tokens=1).token_ids
    result = runtime.generate(variant(tiny, stop_token_ids=tuple(first)), "the dog", max_new_tokens=9)
    assert (result.text, result.token_ids, result.finish_reason) == ("", first, "stop")


def test_a_stop_token_may_be_given_more_than_once(tiny):
    first = runtime.generate(tiny, "the dog", max_new_tokens=1).token_ids
    result = runtime.generate(tiny, "the dog", max_new_tokens=9, stop_token_ids=[*first, 1, 5] * 20)
    assert (result.token_ids, result.finish_reason) == (first, "stop")


def test_a_stop_string_cuts_the_text(tiny):
    free = runtime.generate(tiny, "the dog", max_new_tokens=60, ignore_eos=True)
    for size in (1, 2, 5):
        stop = free.text[20 : 20 + size]
        at = free.text.index(stop)
        result = runtime.generate(tiny, "the dog", max_new_tokens=60, ignore_eos=True, stop=["not there", stop])
        assert result.text == free.text[:at]
        assert result.finish_reason == "stop"
        assert result.token_ids == free.token_ids[: len(result.token_ids)]
        said = tiny.tokenizer.decode(result.token_ids)
        assert stop in said and stop not in tiny.tokenizer.decode(result.token_ids[:-1])


def test_a_stop_string_that_never_comes_loses_no_text(tiny):
    free = runtime.generate(tiny, "the dog", max_new_tokens=30, ignore_eos=True)
    stop = free.text[-3:] + "!"  # its beginning is held back until the end
    assert runtime.generate(tiny, "the dog", max_new_tokens=30, ignore_eos=True, stop=stop).text == free.text


def test_a_prompt_and_answer_may_fill_the_model(tiny):
    ids = [7 + i % 200 for i in range(100)]
    assert len(runtime.generate(tiny, ids, max_new_tokens=28, ignore_eos=True).token_ids) == 28
    assert len(runtime.generate(tiny, [9] * 127, max_new_tokens=1).token_ids) == 1


IDS = [2, 283, 9, 30]
PADDED = [[0, 0, *IDS], [*IDS, 7, 0]]
MASK = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
ONE_PROMPT = {
    "tuple": tuple(IDS),
    "range": range(2, 9),
    "numpy integers": [np.int64(token) for token in IDS],
    "array": np.array(IDS, dtype=np.uint16),
    "tensor": torch.tensor(IDS),
    "tensors": list(torch.tensor(IDS)),
    "mapping": {"input_ids": IDS, "token_type_ids": [0] * 4},
    "encoding": BatchEncoding({"input_ids": PADDED[1], "attention_mask": MASK[1]}),
}
BATCHES = {
    "lists": [IDS, [9]],
    "array": np.array([IDS, IDS]),
    "a batch of one": torch.tensor([IDS]),
    "mixture": ["the dog", IDS, np.array(IDS), torch.tensor(IDS)],
    "mappings": [{"input_ids": IDS}, {"input_ids": PADDED[0], "attention_mask": MASK[0]}],
    "padded lists": BatchEncoding({"input_ids": PADDED, "attention_mask": MASK}),
    "padded tensors": {"input_ids": torch.tensor(PADDED), "attention_mask": torch.tensor(MASK, dtype=torch.bool)},
    "list of arrays": {"input_ids": list(np.array(PADDED)), "attention_mask": list(np.array(MASK))},
}


@pytest.mark.parametrize("prompt", ONE_PROMPT.values(), ids=ONE_PROMPT)
def test_one_prompt_of_ids_in_any_form(tiny, prompt):
    result = runtime.generate(tiny, prompt, max_new_tokens=np.int32(3))
    expected = {range: tuple(range(2, 9)), BatchEncoding: (*IDS, 7)}.get(type(prompt), tuple(IDS))
    assert result.prompt_token_ids == expected and all(type(token) is int for token in result.prompt_token_ids)
    assert result.token_ids == runtime.generate(tiny, list(expected), max_new_tokens=3).token_ids
    assert [token.id for token in runtime.inspect(tiny, prompt).prompt] == list(expected)


@pytest.mark.parametrize(("form", "prompts"), BATCHES.items(), ids=BATCHES)
def test_a_batch_in_any_form(tiny, form, prompts):
    texts = tuple(tiny.tokenizer.encode("the dog"))
    expected = {
        "lists": [tuple(IDS), (9,)],
        "a batch of one": [tuple(IDS)],
        "mixture": [texts, *[tuple(IDS)] * 3],
    }.get(form, [tuple(IDS), (*IDS, 7) if "padded" in form or form == "list of arrays" else tuple(IDS)])
    assert [row.prompt_token_ids for row in runtime.generate(tiny, prompts, max_new_tokens=0)] == expected


def test_numpys_text_is_text(tiny):
    expected = runtime.generate(tiny, "the dog", max_new_tokens=2)
    assert runtime.generate(tiny, np.str_("the dog"), max_new_tokens=2).prompt_token_ids == expected.prompt_token_ids
    rows = runtime.generate(tiny, list(np.array(["the dog", "a"])), max_new_tokens=2)
    assert rows[0].token_ids == expected.token_ids


def test_results_are_hashable_and_equal_by_value(tiny):
    result = runtime.generate(tiny, "the dog", max_new_tokens=3)
    again = pickle.loads(pickle.dumps(result))
    assert again == result and len({result, again, result.stats, runtime.inspect(tiny, "the dog")}) == 3
    assert json.loads(json.dumps(result.to_dict()))["token_ids"] == list(result.token_ids)


BAD_CALLS = {
    "empty text": (ValueError, "prompt is empty", {"prompt": ""}),
    "no ids": (ValueError, "prompt is empty", {"prompt": []}),
    "empty row": (ValueError, r"prompt\[1\] is empty", {"prompt": ["the", ""]}),
    "row without ids": (ValueError, r"prompt\[1\] is empty", {"prompt": [[2], []]}),
    "no prompt": (TypeError, "text or a list of token ids, got NoneType", {"prompt": None}),
    "number": (TypeError, "got int", {"prompt": 3}),
    "messages": (
        TypeError,
        r"use runtime\.chat\(model, messages\)",
        {"prompt": [{"role": "user", "content": "A"}] * 5},
    ),
    "conversations": (TypeError, r"use runtime\.chat", {"prompt": [[{"role": "user", "content": "A"}]]}),
    "number in an array": (ValueError, "an array of 0 dimensions", {"prompt": np.array(3)}),
    "deep array": (ValueError, "an array of 3 dimensions", {"prompt": torch.zeros(1, 1, 2, dtype=torch.int64)}),
    "deep list": (TypeError, r"prompt\[0\] must hold token ids, got list", {"prompt": [[[2]]]}),
    "empty array": (ValueError, "prompt is empty", {"prompt": np.array([], dtype=np.int64)}),
    "empty rows": (ValueError, r"prompt\[0\] is empty", {"prompt": torch.zeros(2, 0, dtype=torch.int64)}),
    "array of floats": (TypeError, r"prompt\[0\] must be an integer, got 2\.0", {"prompt": np.array([2.0, 3.0])}),
    "tensor of bools": (TypeError, r"prompt\[0\] must be an integer, got True", {"prompt": torch.tensor([True])}),
    "tensor without data": (ValueError, "must hold its values", {"prompt": torch.empty(3, device="meta")}),
    "text as ids": (TypeError, r"input_ids'\] must be ids, got str", {"prompt": {"input_ids": "the dog"}}),
    "nested mapping": (TypeError, "must be ids, got dict", {"prompt": {"input_ids": {"input_ids": [2]}}}),
    "deep mask": (ValueError, "of the shape of its input_ids", {"prompt": {"input_ids": [2], "attention_mask": [[1]]}}),
    "word for ignore_eos": (TypeError, "ignore_eos must be True or False, got 'no'", {"ignore_eos": "no"}),
    "pixels": (ValueError, "got the keys pixel_values", {"prompt": {"input_ids": [2], "pixel_values": [[0.5]]}}),
    "no ids in a mapping": (ValueError, "must hold input_ids .* got the keys text", {"prompt": {"text": "A"}}),
    "a hole": (
        ValueError,
        "zeros only before and after",
        {"prompt": {"input_ids": IDS, "attention_mask": [1, 0, 1, 1]}},
    ),
    "short mask": (ValueError, "of the shape", {"prompt": {"input_ids": IDS, "attention_mask": [1]}}),
    "flat mask": (ValueError, "of the shape", {"prompt": {"input_ids": [IDS], "attention_mask": [1]}}),
    "nothing but padding": (ValueError, "prompt is empty", {"prompt": {"input_ids": [0], "attention_mask": [0]}}),
    "fractional mask": (ValueError, "with zeros only", {"prompt": {"input_ids": [2], "attention_mask": [0.5]}}),
    "bytes": (TypeError, "got bytes", {"prompt": b"the"}),
    "text among ids": (TypeError, r"prompt\[1\] must be an integer, got 'the'", {"prompt": [2, "the"]}),
    "id among texts": (TypeError, r"prompt\[1\] must be text or a list of token ids, got int", {"prompt": ["the", 2]}),
    "half of a surrogate pair": (ValueError, "surrogate", {"prompt": "the \ud800"}),
    "negative id": (ValueError, r"prompt\[1\] must be from 0 to 298, got -1", {"prompt": [2, -1]}),
    "id past the vocabulary": (ValueError, r"prompt\[0\] must be from 0 to 298, got 299", {"prompt": [299]}),
    "huge id": (ValueError, "must be from 0 to 298", {"prompt": [2**70]}),
    "bool id": (TypeError, "must be an integer, got True", {"prompt": [2, True]}),
    "float id": (TypeError, r"must be an integer, got 3\.0", {"prompt": [2, 3.0]}),
    "id in a row": (ValueError, r"prompt\[1\]\[2\] must be from 0 to 298, got 400", {"prompt": [[2], [2, 3, 400]]}),
    "prompt too long": (ValueError, r"max_seq_len = 128 together, got 120 \+ 9 = 129", {"prompt": [9] * 120}),
    "row too long": (ValueError, r"prompt\[1\] and max_new_tokens .* 120 \+ 9", {"prompt": [[9], [9] * 120]}),
    "negative length": (ValueError, "max_new_tokens must be at least 0, got -1", {"max_new_tokens": -1}),
    "fractional length": (TypeError, r"max_new_tokens must be an integer, got 1\.5", {"max_new_tokens": 1.5}),
    "length not a number": (TypeError, "max_new_tokens must be an integer, got nan", {"max_new_tokens": math.nan}),
    "bool length": (TypeError, "max_new_tokens must be an integer, got True", {"max_new_tokens": True}),
    "no length": (TypeError, "max_new_tokens must be an integer, got None", {"max_new_tokens": None}),
    "empty stop": (ValueError, "empty string", {"stop": ""}),
    "empty stop in a list": (ValueError, "empty string", {"stop": ["a", ""]}),
    "negative timeout": (ValueError, "timeout must be at least 0 seconds, got -1", {"timeout": -1}),
    "timeout not a number": (TypeError, "timeout must be a number of seconds or None, got '9'", {"timeout": "9"}),
    "nan for a timeout": (ValueError, "timeout must be at least 0 seconds, got nan", {"timeout": math.nan}),
    "cancel without an event": (TypeError, "cancel must be a threading.Event or None, got bool", {"cancel": True}),
    "negative temperature": (ValueError, "temperature must be a finite number from 0 on, got -1", {"temperature": -1}),
    "temperature not a number": (
        ValueError,
        "temperature must be a finite number .* got nan",
        {"temperature": math.nan},
    ),
    "infinite temperature": (ValueError, "temperature must be a finite number .* got inf", {"temperature": math.inf}),
    "word for temperature": (TypeError, "temperature must be a number, got 'hot'", {"temperature": "hot"}),
    "no temperature": (TypeError, "temperature must be a number, got None", {"temperature": None}),
    "bool temperature": (TypeError, "temperature must be a number, got True", {"temperature": True}),
    "temperatures of one prompt": (TypeError, "temperature must be one value for one prompt", {"temperature": [1.0]}),
    "too few temperatures": (
        ValueError,
        "temperature must be one value, or one for each of 2 prompts, got 1",
        {"prompt": ["the", "dog"], "temperature": [1.0]},
    ),
    "one bad temperature": (
        ValueError,
        r"temperature\[1\] must be a finite number from 0 on, got -2",
        {"prompt": ["the", "dog"], "temperature": [1.0, -2]},
    ),
    "negative seed": (ValueError, r"seed must be from 0 to 2\^64 - 1, got -1", {"seed": -1}),
    "seed of 65 bits": (ValueError, r"seed must be from 0 to 2\^64 - 1, got 18446744073709551616", {"seed": 2**64}),
    "fractional seed": (TypeError, r"seed must be an integer or None, got 1\.5", {"seed": 1.5}),
    "bool seed": (TypeError, "seed must be an integer or None, got True", {"seed": True}),
    "one bad seed": (
        TypeError,
        r"seed\[0\] must be an integer or None, got 'a'",
        {"prompt": ["the", "dog"], "seed": ["a", 2]},
    ),
    "negative top-k": (ValueError, "top_k must be at least 0, got -1", {"top_k": -1}),
    "fractional top-k": (TypeError, r"top_k must be an integer or None, got 1\.5", {"top_k": 1.5}),
    "top-p of nothing": (ValueError, "top_p must be a finite number above 0, at most 1, got 0", {"top_p": 0}),
    "top-p above 1": (ValueError, r"top_p must be a finite number above 0, at most 1, got 1\.1", {"top_p": 1.1}),
    "min-p below 0": (ValueError, r"min_p must be a finite number from 0 to 1, got -0\.1", {"min_p": -0.1}),
    "word for min-p": (TypeError, "min_p must be a number or None, got 'x'", {"min_p": "x"}),
    "no repetition penalty": (ValueError, "repetition_penalty .* above 0, got 0", {"repetition_penalty": 0}),
    "wild presence penalty": (ValueError, "presence_penalty .* from -2 to 2, got 3", {"presence_penalty": 3}),
    "no frequency penalty": (TypeError, "frequency_penalty must be a number, got None", {"frequency_penalty": None}),
    "bias of a list": (TypeError, "logit_bias must be a mapping of token ids", {"logit_bias": 5}),
    "bias of a word": (TypeError, "logit_bias must have token ids as keys, got 'a'", {"logit_bias": {"a": 1.0}}),
    "bias of infinity": (ValueError, r"logit_bias\[3\] must be a finite number or -inf", {"logit_bias": {3: math.inf}}),
    "bias outside": (ValueError, "a token id of logit_bias must be from 0 to 298, got 299", {"logit_bias": {299: 1}}),
    "stop id outside": (ValueError, "of stop_token_ids must be from 0 to 298, got 299", {"stop_token_ids": [299]}),
    "stop ids in a word": (TypeError, "stop_token_ids must be a list of token ids, got 'a'", {"stop_token_ids": "a"}),
    "too many stop ids": (ValueError, "at most 32 together, got 42", {"stop_token_ids": list(range(200, 240))}),
    "more new tokens than allowed": (
        ValueError,
        "min_new_tokens must be at most max_new_tokens = 9, got 10",
        {"min_new_tokens": 10},
    ),
    "too many log probabilities": (ValueError, "logprobs must be from 0 to 299, got 300", {"logprobs": 300}),
    "log probabilities in a word": (TypeError, "logprobs must be an integer or None, got 'a'", {"logprobs": "a"}),
    "negative prompt log probabilities": (ValueError, "prompt_logprobs must be at least 0", {"prompt_logprobs": -1}),
    "no answers": (ValueError, "n must be from 1 to 1024, got 0", {"n": 0}),
    "processor of a list": (TypeError, "logits_processors must be a list of functions", {"logits_processors": len}),
    "processor of a number": (TypeError, r"logits_processors\[0\] must be a function", {"logits_processors": [3]}),
    "unknown option": (TypeError, "there is no option max_tokens: here it is max_new_tokens", {"max_tokens": 3}),
    "misspelt option": (TypeError, "there is no option temprature: here it is temperature", {"temprature": 3}),
    "foreign option": (TypeError, "there is no option xyzzy$", {"xyzzy": 3}),
    "stop of another type": (TypeError, "stop must be a string or a list of strings, got 5", {"stop": 5}),
    "stop ids": (TypeError, r"stop must be a string or a list of strings, got \[5\]", {"stop": [5]}),
}


@pytest.mark.parametrize("call", [runtime.generate, runtime.stream], ids=["generate", "stream"])
@pytest.mark.parametrize(("error", "message", "arguments"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_input_is_refused_before_anything_changes(tiny, call, error, message, arguments):
    with pytest.raises(error, match=message) as caught:
        call(tiny, **{"prompt": "the dog", "max_new_tokens": 9} | arguments)
    assert "\n" not in str(caught.value)
    assert tiny.engine is None
    assert runtime.generate(tiny, "the dog", max_new_tokens=3).token_ids


def test_a_prompt_is_checked_before_the_default_model_is_loaded(monkeypatch):
    monkeypatch.setattr("runtime.loading.resolve", lambda: pytest.fail("resolved the default model"))
    for prompt, options in (([], {}), ([{"role": "user", "content": "A"}], {}), ("A", {"stop": ""})):
        with pytest.raises(runtime.GemmaRuntimeError):
            runtime.generate(prompt, **options)


def test_something_else_than_a_model(tiny):
    with pytest.raises(TypeError, match="expected a model before the prompt, got str"):
        runtime.generate("demo", "the dog")


def test_without_a_tokenizer_ids_work_and_text_does_not(tiny):
    bare = dataclasses.replace(tiny, tokenizer=None)
    expected = runtime.generate(tiny, "the dog", max_new_tokens=20)
    result = runtime.generate(bare, expected.prompt_token_ids, max_new_tokens=20)
    assert (result.text, result.token_ids) == ("", expected.token_ids)
    with pytest.raises(ValueError, match="has no tokenizer: give a list of token ids"):
        runtime.generate(bare, "the dog")
    with pytest.raises(ValueError, match="stop strings need text"):
        runtime.generate(bare, [2, 3], stop="a")


def test_the_default_model_is_loaded_once(tiny, tiny_folder, monkeypatch):
    from importlib import import_module

    module = import_module("runtime.generation")
    loads = []
    monkeypatch.setattr("runtime.loading.resolve", lambda: loads.append(1))
    monkeypatch.setattr("runtime.loading.read", lambda *_: tiny)
    module._default_model.cache_clear()
    try:
        results = []
        ask = lambda: results.append(runtime.generate("the dog", max_new_tokens=5).token_ids)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert loads == [1]
        assert results == [runtime.generate(tiny, "the dog", max_new_tokens=5).token_ids] * 4
    finally:
        module._default_model.cache_clear()


def test_callers_in_several_threads_take_turns(tiny):
    expected = {prompt: runtime.generate(tiny, prompt, max_new_tokens=40).token_ids for prompt in PROMPTS}
    got, barrier = [], threading.Barrier(len(PROMPTS))

    def ask(prompt):
        barrier.wait()
        for _ in range(5):
            got.append((prompt, runtime.generate(tiny, prompt, max_new_tokens=40).token_ids))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 5 * len(PROMPTS)
    assert all(ids == expected[prompt] for prompt, ids in got)


@pytest.mark.parametrize("at", [1, 2, 10])
@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_after_an_error_in_a_step_the_next_call_is_right(tiny, monkeypatch, at, error):
    expected = tokens_of(runtime.generate(tiny, PROMPTS, max_new_tokens=40))
    steps, stepper = [], decode.stepper

    def failing_stepper(model, state, count, *more):
        step = stepper(model, state, count)

        def failing():
            steps.append(1)
            if len(steps) == at:
                raise error
            step()

        return failing

    monkeypatch.setattr(decode, "stepper", failing_stepper)
    with pytest.raises(type(error)):
        runtime.generate(tiny, PROMPTS, max_new_tokens=40)
    monkeypatch.undo()
    assert tokens_of(runtime.generate(tiny, PROMPTS, max_new_tokens=40)) == expected


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_the_cut_at_a_stop_string_does_not_depend_on_the_pieces(text, strings, data):
    stop, taken, begins = StopStrings(strings), 0, None
    while taken < len(text) and begins is None:
        size = data.draw(st.integers(1, len(text) - taken))
        begins = stop.push(text[taken : taken + size].encode())
        taken += size
    # In the text as a whole: the first end of any stop string, and there the longest.
    ends = [(end, end - len(s)) for end in range(len(text) + 1) for s in strings if text[:end].endswith(s)]
    assert (begins is None) == (not ends)
    assert begins is None or taken - begins == min(ends)[1]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_only_what_may_become_a_stop_string_is_held_back(text, strings):
    stop = StopStrings(strings)
    for taken in range(1, len(text) + 1):
        if stop.push(text[taken - 1 : taken].encode()) is not None:
            break
        beginnings = [s[:size] for s in strings for size in range(1, len(s)) if text[:taken].endswith(s[:size])]
        assert stop.pending == max(map(len, beginnings), default=0)

"""What an actor of Ray Data makes of a batch, without a cluster; the examples have the clusters."""

import pytest

import runtime
from runtime import api
from runtime.errors import GrammarTooComplex, InvalidArgument
from runtime.sampling.grammar import Grammars, Matcher

pytest.importorskip("ray.data", reason="needs the ray extra")
pytestmark = pytest.mark.ray

import pyarrow  # noqa: E402

from runtime.ray import build_processor  # noqa: E402
from runtime.ray.processor import COLUMNS, Answering  # noqa: E402

LOADING = {"device": "cpu", "max_batch": 4, "max_seq_len": 128}
OPTIONS = {"max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def actor(tiny_folder):
    return Answering(str(tiny_folder), LOADING, OPTIONS)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return api.load(tiny_folder, **LOADING)


def answers(actor, rows):
    table = actor(pyarrow.Table.from_pylist(rows))
    assert table.schema.field("seed").type == COLUMNS.field("seed").type
    return table.to_pylist()


def test_a_row_gets_the_tokens_of_generate_alone_and_keeps_what_it_has(actor, model):
    rows = [
        {"prompt": f"the dog {i}", "name": i, "sampling_params": {"temperature": float(i % 2), "seed": 2**63 - 1 - i}}
        for i in range(9)
    ]
    found = answers(actor, rows)
    alone = [runtime.generate(model, row["prompt"], **OPTIONS, **row["sampling_params"]) for row in rows]
    assert [row["generated_tokens"] for row in found] == [list(result.token_ids) for result in alone]
    assert [row["generated_text"] for row in found] == [result.text for result in alone]
    assert [row["prompt_token_ids"] for row in found] == [list(result.prompt_token_ids) for result in alone]
    assert [row["name"] for row in found] == list(range(9))
    assert {(row["finish_reason"], row["error"]) for row in found} == {("length", None)}
    assert [row["seed"] for row in found[1::2]] == [row["sampling_params"]["seed"] for row in rows[1::2]]


def test_a_draw_without_a_seed_says_what_repeats_it(actor, model):
    (found,) = answers(actor, [{"prompt": "the dog", "sampling_params": {"temperature": 1.0}}])
    again = runtime.generate(model, "the dog", temperature=1.0, seed=found["seed"], **OPTIONS)
    assert found["generated_tokens"] == list(again.token_ids)


def test_prompts_may_be_ids_and_conversations(actor, model):
    (by_ids,) = answers(actor, [{"prompt": [2, 9, 17]}])
    assert by_ids["generated_tokens"] == list(runtime.generate(model, [2, 9, 17], **OPTIONS).token_ids)
    talks = [[{"role": "user", "content": "a dog"}], [{"role": "user", "content": "a", "name": "b"}]]
    found = answers(actor, [{"messages": talk} for talk in talks])
    expected = [runtime.chat(model, talk, **OPTIONS) for talk in talks]
    assert [row["generated_tokens"] for row in found] == [list(result.token_ids) for result in expected]


def test_a_row_that_cannot_be_run_says_why_and_the_others_are_answered(actor):
    found = answers(
        actor,
        [
            {"prompt": "the dog", "sampling_params": None},
            {"prompt": ""},
            {"prompt": "a" * 200},
            {"prompt": "the dog", "sampling_params": {"temperature": -1.0}},
            {"prompt": "the dog", "sampling_params": {"max_tokens": 3}},
            {"prompt": "the dog", "sampling_params": {"logprobs": 1}},
            {"prompt": None},
            {"prompt": "a cat"},
        ],
    )
    said = [row["error"] for row in found]
    assert said[0] is said[7] is None and len(found[0]["generated_tokens"]) == len(found[7]["generated_tokens"]) == 12
    for error, expected in zip(
        said[1:7], ("empty", "128", "temperature", "max_new_tokens", "logprobs", "prompt"), strict=True
    ):
        assert expected in error
    assert found[1]["generated_tokens"] is None


@pytest.mark.parametrize("place", [(Grammars, "compile"), (Matcher, "accept")], ids=["at once", "half way"])
def test_a_row_whose_grammar_is_too_complex_fails_alone(actor, monkeypatch, place):
    pytest.importorskip("llguidance", reason="needs the structured extra")

    def failing(*_):
        raise GrammarTooComplex("too complex")

    monkeypatch.setattr(*place, failing)
    choice = {"response_format": {"regex": "[a-z]{3,9}"}, "ignore_eos": False}
    fails, other = answers(actor, [{"prompt": "the dog", "sampling_params": choice}, {"prompt": "the dog"}])
    assert fails["error"] == "too complex"
    assert other["error"] is None and len(other["generated_tokens"]) == 12


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}])
def test_a_dataset_without_the_column_stops(actor, row):
    with pytest.raises(InvalidArgument, match=f"a column prompt or a column messages, got {', '.join(row)}"):
        answers(actor, [row])


def test_the_columns_of_an_earlier_answer_are_replaced(actor):
    (first,) = answers(actor, [{"prompt": "the dog"}])
    (second,) = answers(actor, [first])
    assert second == first


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"engine_kwargs": {"max_bach": 4}}, TypeError, "max_batch.*got max_bach"),
        ({"sampling_params": {"max_tokens": 4}}, TypeError, "here it is max_new_tokens"),
        ({"sampling_params": {"temperature": -1}}, ValueError, "temperature.*-1"),
        ({"sampling_params": {"cancel": None}}, TypeError, "no option cancel"),
        ({"concurrency": 0}, ValueError, "concurrency must be at least 1, got 0"),
        ({"concurrency": (3, 2)}, ValueError, "concurrency must be at least 3, got 2"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer, got 1.5"),
    ],
)
def test_arguments_are_checked_before_anything_starts(arguments, error, message):
    with pytest.raises(error, match=message):
        build_processor("nowhere", **arguments)

"""`generate` of a model of transformers that decodes by this runtime, against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import runtime
from runtime.bench.small_models import VOCAB
from runtime.engine.prefill import Prefill

FAMILIES = ("gemma", "gemma2", "gemma3")
IDS = torch.tensor([[0, 0, 0, 41, 52, 41, 52], [33, 41, 52, 67, 78, 41, 52], [0, 9, 8, 7, 6, 5, 4]])
MASK = (IDS != 0).long()
PADDED = {"input_ids": IDS, "attention_mask": MASK}
TOKENS = 14


class Odd(LogitsProcessor):
    """Bans even tokens after an odd one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[input_ids[:, -1] % 2 == 1, ::2] = -torch.inf
        return scores


class Streamer(BaseStreamer):
    """What `generate` hands out, in order."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


class After(StoppingCriteria):
    """Ends a row at the first of some tokens; `calls` has what it was called with."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens, self.calls = tokens, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((input_ids.tolist(), None if scores is None else len(scores)))
        return torch.isin(input_ids[:, -1], torch.tensor(self.tokens))


def both(drop: Any, **arguments: Any) -> tuple[Any, Any]:
    """transformers' answer and ours."""
    return tuple(
        model.generate(**{"do_sample": False, "max_new_tokens": TOKENS, **PADDED, **copy.deepcopy(arguments)})
        for model in (drop.theirs, drop.ours)
    )


def assert_equal(drop: Any, **arguments: Any) -> torch.Tensor:
    theirs, ours = both(drop, **arguments)
    assert ours.dtype == theirs.dtype
    assert ours.tolist() == theirs.tolist()
    return ours


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [PADDED, {"input_ids": IDS[1:2], "attention_mask": None}], ids=["padded", "alone"])
def test_greedy_tokens_are_those_of_transformers(drop_in, family, prompts):
    assert_equal(drop_in(family), eos_token_id=None, **prompts)


@pytest.fixture
def common(drop_in):
    """Tokens that the greedy answers of Gemma 3 have, so that what bans or favours them changes something."""
    drop = drop_in("gemma3")
    return drop.theirs.generate(**PADDED, do_sample=False, max_new_tokens=TOKENS)[:, IDS.shape[1] :].tolist()


FIELDS: dict[str, Any] = {
    "repetition_penalty": lambda answers: 1.7,
    "encoder_repetition_penalty": lambda answers: 1.7,
    "no_repeat_ngram_size": lambda answers: 1,
    "encoder_no_repeat_ngram_size": lambda answers: 1,
    "bad_words_ids": lambda answers: [[answers[0][2]], answers[1][3:5]],
    "sequence_bias": lambda answers: [[[answers[0][1]], -9.0], [[17, 18], 9.0], [[17], 9.0]],
    "min_new_tokens": lambda answers: 9,
    "min_length": lambda answers: IDS.shape[1] + 9,
    "forced_eos_token_id": lambda answers: 17,
    "suppress_tokens": lambda answers: answers[0][:4],
    "begin_suppress_tokens": lambda answers: [row[0] for row in answers],
    "exponential_decay_length_penalty": lambda answers: (2, 3.0),
    "renormalize_logits": lambda answers: True,
    "remove_invalid_values": lambda answers: True,
    "logits_processor": lambda answers: transformers.LogitsProcessorList([Odd()]),
    "prefix_allowed_tokens_fn": lambda answers: lambda row, ids: list(range(row + 3, VOCAB, len(ids) % 5 + 1)),
}
# What else is asked for, so that the field has something to do.
BESIDE: dict[str, Any] = {"encoder_no_repeat_ngram_size": {"sequence_bias": [[[41], 9.0]]}}
SAME_TOKENS = {"renormalize_logits", "remove_invalid_values"}


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_does_what_it_does_in_transformers(drop_in, common, field):
    """With a stop token that the plain answer has early, for those fields that concern it."""
    drop, value = drop_in("gemma3"), FIELDS[field](common)
    stops = {"eos_token_id": [common[0][4], common[1][5]], **BESIDE.get(field, {})}
    plain = assert_equal(drop, **stops)
    changed = assert_equal(drop, **stops, **{field: value})
    assert (changed.tolist() == plain.tolist()) == (field in SAME_TOKENS)
    # In the generation config, it holds as well.
    if field not in ("logits_processor", "prefix_allowed_tokens_fn"):
        config = transformers.GenerationConfig(**stops, **{field: value})
        assert assert_equal(drop, generation_config=config).tolist() == changed.tolist()


def test_a_forced_first_token_follows_a_prompt_of_one(drop_in):
    answer = assert_equal(drop_in("gemma"), input_ids=IDS[1:2, :1], attention_mask=None, forced_bos_token_id=77)
    assert answer[0, 1] == 77


def test_the_checkpoints_own_fields_hold_once_and_give_way(tmp_path, drop_in):
    """A penalty that is applied twice is another one."""
    drop = drop_in("gemma3")
    drop.theirs.save_pretrained(tmp_path)
    own = transformers.GenerationConfig(repetition_penalty=1.7, eos_token_id=1, max_new_tokens=9)
    own.save_pretrained(tmp_path)
    ours = runtime.load(tmp_path, interface="hf", device="cpu", max_seq_len=64, max_batch=4, progress=False)
    theirs = drop.theirs.generate
    greedy = {**PADDED, "do_sample": False}
    penalised, neutral = {"repetition_penalty": 1.7}, {"repetition_penalty": 1.0}
    assert ours.generate(**greedy).tolist() == theirs(**greedy, **penalised, max_new_tokens=9).tolist()
    assert ours.generate(**greedy, **neutral).tolist() == theirs(**greedy, **neutral, max_new_tokens=9).tolist()
    over = transformers.GenerationConfig(repetition_penalty=1.0, max_new_tokens=7)
    assert ours.generate(**greedy, generation_config=over).shape[1] == IDS.shape[1] + 7


def test_rows_that_end_are_padded_and_the_answer_ends_with_the_last(drop_in, common):
    stops = [row[3] for row in common]
    answer = assert_equal(drop_in("gemma3"), eos_token_id=stops, pad_token_id=3)
    assert answer.shape[1] <= IDS.shape[1] + 4
    one = assert_equal(drop_in("gemma3"), eos_token_id=stops[0], pad_token_id=3)
    assert one[0, -1] == 3  # and the others go on


def test_more_stop_tokens_than_a_step_compares_end_an_answer_too(drop_in, common):
    assert_equal(drop_in("gemma3"), eos_token_id=[*range(3, 80), common[0][6], VOCAB + 5])


@pytest.mark.parametrize(
    "length", [{}, {"max_length": 12}, {"max_new_tokens": 1}, {"max_new_tokens": 3, "max_length": 9}], ids=str
)
def test_lengths_are_those_of_transformers(drop_in, length):
    """Without any, it is 20 new tokens."""
    arguments = {**PADDED, "do_sample": False, "eos_token_id": None, **length}
    drop = drop_in("gemma")
    answer = drop.ours.generate(**arguments)
    assert answer.tolist() == drop.theirs.generate(**arguments).tolist()
    assert answer.shape[1] == IDS.shape[1] + 20 or length


def test_answers_to_the_same_prompt_stand_side_by_side(drop_in):
    torch.manual_seed(5)
    answers = drop_in("gemma3").ours.generate(
        **PADDED, do_sample=True, temperature=2.0, num_return_sequences=3, max_new_tokens=5, eos_token_id=None
    )
    assert answers.shape == (9, IDS.shape[1] + 5)
    assert answers[:, : IDS.shape[1]].tolist() == IDS.repeat_interleave(3, dim=0).tolist()
    assert len({tuple(row) for row in answers.tolist()}) == 9


def test_answers_to_the_same_prompt_share_one_run_of_it(drop_in, monkeypatch):
    ours, runs = drop_in("gemma3").ours, []
    plain = Prefill.__init__

    def counted(prefill, model, state, row, ids, **options):
        runs.append(tuple(ids))
        plain(prefill, model, state, row, ids, **options)

    monkeypatch.setattr(Prefill, "__init__", counted)
    given = {"input_ids": IDS[1:2], "num_return_sequences": 4, "max_new_tokens": 6, "eos_token_id": None}
    records = {"return_dict_in_generate": True, "output_logits": True}
    for choice in ({}, {"repetition_penalty": 1.3}, records):
        torch.manual_seed(9)
        together = ours.generate(**given, **choice, do_sample=True, temperature=2.0)
        assert len(runs) == 1
        sequences = getattr(together, "sequences", together)
        assert len({tuple(row) for row in sequences.tolist()}) == 4
        runs.clear()
    for logits in together.logits[0]:
        assert torch.equal(logits, together.logits[0][0])


def test_seeds_of_torch_repeat_draws(drop_in):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(drop_in("gemma").ours.generate(**PADDED, do_sample=True, max_new_tokens=8).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_scores_are_those_of_transformers(drop_in, family):
    arguments = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = both(drop_in(family), eos_token_id=None, repetition_penalty=1.3, **arguments)
    assert type(ours) is type(theirs)
    assert set(ours) == set(theirs) - {"past_key_values"}
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in ("logits", "scores"):
        assert isinstance(ours[name], tuple)
        assert len(ours[name]) == TOKENS
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
            # Both sum in fp32, each in its own order, over a few hundred products.
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4 * float(other.abs().max()))
    assert not torch.equal(ours.logits[0], ours.scores[0])


def test_a_row_that_has_ended_has_logits_of_zero(drop_in, common):
    ours = drop_in("gemma3").ours.generate(
        **PADDED,
        do_sample=False,
        max_new_tokens=9,
        eos_token_id=common[0][2],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert [bool(step[0].any()) for step in ours.logits] == [True] * 3 + [False] * (len(ours.logits) - 3)
    assert all(step[1].any() for step in ours.logits)
    assert ours.scores is None
    scores = drop_in("gemma3").ours.generate(**PADDED, max_new_tokens=2, output_scores=True)
    assert isinstance(scores, torch.Tensor)  # no dict, as in transformers


@settings(max_examples=25, deadline=None)
@given(
    temperature=st.floats(0.2, 4.0),
    top_k=st.sampled_from((0, 1, 5, 50, VOCAB + 1)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.none(), st.floats(0.0, 0.5)),
    other=st.sampled_from(({}, {"typical_p": 0.7}, {"epsilon_cutoff": 0.01}, {"eta_cutoff": 0.01})),
)
def test_tokens_are_drawn_from_what_transformers_would_draw_from(drop_in, temperature, top_k, top_p, min_p, other):
    """Scores are what transformers' warpers make of the same logits, and no token that they rule out is drawn."""
    drop = drop_in("gemma3")
    numbers = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, **other}
    answer = drop.ours.generate(
        **PADDED,
        do_sample=True,
        max_new_tokens=3,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **numbers,
    )
    config = transformers.GenerationConfig(do_sample=True, **numbers)
    warpers = drop.theirs._get_logits_processor(config, logits_processor=[])
    for step, (logits, scores) in enumerate(zip(answer.logits, answer.scores, strict=True)):
        ids = answer.sequences[:, : IDS.shape[1] + step]
        torch.testing.assert_close(scores, warpers(ids, logits), rtol=0, atol=0)
        drawn = answer.sequences[:, IDS.shape[1] + step]
        assert scores.gather(1, drawn[:, None]).isfinite().all()


def test_draws_follow_the_warped_distribution(drop_in):
    """A chi-squared statistic of 500 draws over the six tokens that top-k leaves: 5 degrees of freedom, beyond 20.5 in
    one of a thousand seeds, and the seed is fixed."""
    drop, draws = drop_in("gemma3"), 500
    numbers = {"do_sample": True, "temperature": 1.5, "top_k": 6, "max_new_tokens": 1}
    torch.manual_seed(3)
    answer = drop.ours.generate(
        IDS[1:2], num_return_sequences=draws, return_dict_in_generate=True, output_scores=True, **numbers
    )
    expected = answer.scores[0][0].softmax(0) * draws
    observed = answer.sequences[:, -1].bincount(minlength=VOCAB)
    kept = expected > 0
    assert int(kept.sum()) == 6
    assert int(observed[~kept].sum()) == 0
    assert float(((observed - expected)[kept] ** 2 / expected[kept]).sum()) < 20.5


@pytest.mark.parametrize("rows", [slice(1, 2), slice(0, 3)], ids=["alone", "batch"])
def test_a_streamer_gets_prompts_then_tokens_then_the_end(drop_in, common, rows):
    theirs, ours = Streamer(), Streamer()
    drop, arguments = drop_in("gemma3"), {"do_sample": False, "max_new_tokens": 9, "eos_token_id": common[1][4]}
    prompts = {name: value[rows] for name, value in PADDED.items()}
    answer = drop.ours.generate(**prompts, **arguments, streamer=ours)
    drop.theirs.generate(**prompts, **arguments, streamer=theirs)
    assert ours.seen == theirs.seen
    assert ours.seen[0] == prompts["input_ids"].tolist()
    assert ours.seen[-1] == "end"
    assert [list(step) for step in zip(*ours.seen[1:-1], strict=True)] == answer[:, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("stops", [None, 1], ids=["no stop token", "a stop token"])
@pytest.mark.parametrize("scores", [False, True], ids=["tokens", "scores"])
def test_stopping_criteria_see_what_those_of_transformers_see(drop_in, common, stops, scores):
    """Without a stop token rows that have ended go on until the last has."""
    drop = drop_in("gemma3")
    criteria = [After((common[0][3], common[1][5], common[2][1])) for _ in range(2)]
    answers = [
        model.generate(
            **PADDED,
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=stops,
            output_scores=scores,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([own]),
        ).sequences.tolist()
        for model, own in zip((drop.theirs, drop.ours), criteria, strict=True)
    ]
    assert answers[0] == answers[1]
    assert criteria[0].calls == criteria[1].calls
    assert len(answers[1][0]) < IDS.shape[1] + TOKENS


def test_time_that_is_up_ends_the_answer_after_its_next_token(drop_in):
    answer = drop_in("gemma").ours.generate(**PADDED, max_time=0.0, max_new_tokens=30, do_sample=False)
    assert answer.shape[1] == IDS.shape[1] + 1


REFUSED: dict[str, Any] = {
    "num_beams": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "prompt_lookup_num_tokens": 3,
    "guidance_scale": 1.5,
    "token_healing": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "inputs_embeds": torch.zeros(3, 7, 84),
    "custom_generate": "owner/name",
    "past_key_values": transformers.DynamicCache(),
    "negative_prompt_ids": IDS,
    "cache_implementation": "paged",
    "no_such_argument": 3,
    "position_ids": torch.arange(7).expand(3, 7) + 1,
    "attention_mask": MASK.flip(1),
    "max_length": 7,
    "temperature": 0.0,
    "top_p": 1.5,
    "max_new_tokens": 10**12,
}
NAMES = {
    "num_beams": "beam",
    "penalty_alpha": "contrastive",
    "prompt_lookup_num_tokens": "assisted",
    "dola_layers": "dola",
}
NAMES |= {"max_new_tokens": "max_seq_len"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(drop_in, name):
    drop = drop_in("gemma3")
    arguments = {"do_sample": name in ("temperature", "top_p"), "top_k": 4 if name == "penalty_alpha" else None}
    with pytest.raises(ValueError, match=f"(?i){NAMES.get(name, name)}"):
        drop.ours.generate(**{**PADDED, **arguments, name: REFUSED[name]})
    assert_equal(drop, max_new_tokens=2)


class Failure(Exception):
    """What a caller's own code raises."""


class Failing(BaseStreamer):
    """A streamer, processor or criterion that fails at its third call."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        self(value, value)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise Failure
        return scores if scores is not None else torch.zeros(len(input_ids), dtype=torch.bool)

    def end(self) -> None: ...


@pytest.mark.parametrize("where", ["streamer", "logits_processor", "stopping_criteria"])
def test_what_a_caller_raises_reaches_it_and_leaves_the_model_usable(drop_in, where):
    drop = drop_in("gemma3")
    given = Failing() if where == "streamer" else [Failing()]
    with pytest.raises(Failure):
        drop.ours.generate(**PADDED, do_sample=False, max_new_tokens=9, **{where: given})
    assert_equal(drop)

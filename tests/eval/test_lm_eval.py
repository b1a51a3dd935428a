"""`runtime.lm_eval` beside the harness's own `hf` model: the same task, checkpoint and rules, so the same scores.

The checkpoints are small random models; the tasks stand beside this file. In the folder of this file,

    python -m runtime.lm_eval --model gemma-runtime --model_args pretrained=demo --include_path . \
        --tasks gemma_runtime_choice,gemma_runtime_rolling,gemma_runtime_until

scores a real model on them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime

lm_eval = pytest.importorskip("lm_eval", reason="needs the eval extra")
pytest.importorskip("accelerate", reason="the harness's own model needs it")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from runtime.bench import quality  # noqa: E402
from runtime.checkpoint.cache import CACHE_ENV  # noqa: E402
from runtime.engine.answer import Answer  # noqa: E402
from runtime.lm_eval import GemmaRuntimeLM, arguments  # noqa: E402
from runtime.lm_eval.__main__ import main  # noqa: E402
from runtime.loading import resolve  # noqa: E402

from ..runtime.container_files import Packed, Variant, pack_model, save_plain_model  # noqa: E402

HERE = Path(__file__).parent
TASKS = {"gemma_runtime_choice": "choice", "gemma_runtime_rolling": "rolling", "gemma_runtime_until": "until"}
MAX_LENGTH = 48  # so that some contexts lose their beginning, and most texts need several windows
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_length": MAX_LENGTH}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]


@dataclass
class Pair:
    """One checkpoint in the harness's own model and in ours."""

    folder: str
    attention: dict[str, str]  # how the `hf` model must compute it
    hf: Any
    ours: Any
    hf_scores: dict[str, Any]
    our_scores: dict[str, Any]

    def rounding(self, tokens: int) -> float:
        """The most by which two fp32 scores of so many tokens may differ where only the head's sums differ in order.

        Both run the same operations on the same residual stream, but not on equally many rows at a time. The head's
        input is n * (1 + w), where the norm leaves n at most sqrt(hidden) long; so the terms of a logit, in absolute
        value, sum to `reach` at most, and two orders of summation differ by 2 * gamma(hidden) * reach at most (Higham,
        Accuracy and Stability of Numerical Algorithms, 3.1). That moves a log-probability by up to twice as much; what
        log_softmax and the sum over tokens round themselves is added for both models. A softcap only lowers it.
        """
        weights, config = self.ours.model.weights, self.ours.model.config
        scaled = weights.embedding.double() * (1 + weights.final_norm.double())
        reach = math.sqrt(config.hidden) * float(scaled.norm(dim=1).max())
        largest = 2 * reach + math.log(config.vocab)
        head = 2 * 2 * gamma(config.hidden) * reach
        softmax = gamma(config.vocab) + 4 * gamma(1) * largest
        return tokens * (head + 2 * softmax + 2 * gamma(tokens) * largest)


def gamma(terms: int) -> float:
    """The relative error of an fp32 sum of so many terms, at most."""
    return terms * 2.0**-24 / (1 - terms * 2.0**-24)


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def pair(request, small_pair, tmp_path_factory) -> Pair:
    folder = small_pair(request.param, seed=7).hf.name_or_path
    write_tokenizer(folder)
    attention = {"attn_implementation": "eager"} if request.param == "gemma2" else {}
    manager = TaskManager(include_path=str(HERE), include_defaults=False)

    def evaluate(model: Any) -> dict[str, Any]:
        return lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HERE)  # the tasks name their files without a folder
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        hf, ours = HFLM(folder, **OPTIONS, **attention), GemmaRuntimeLM(folder, **OPTIONS)
        return Pair(folder, attention, hf, ours, evaluate(hf), evaluate(ours))


def write_tokenizer(folder: str) -> None:
    """A Gemma tokenizer with every byte and the commonest pieces of the tasks' texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    texts = [str(value) for task in TASKS.values() for row in rows(task) for value in row.values()]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.Replace(" ", "▁")
    pieces.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=499, special_tokens=[*SPECIALS, *byte_tokens], show_progress=False)
    pieces.train_from_iterator(texts, trainer)
    model = json.loads(pieces.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True).save_pretrained(folder)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def samples(pair: Pair, task: str) -> list[tuple[Any, Any]]:
    """What each side answered to each request of a task, in order."""
    pairs = zip(pair.hf_scores["samples"][task], pair.our_scores["samples"][task], strict=True)
    answers = [
        answer
        for theirs, ours in pairs
        for answer in zip(theirs["filtered_resps"], ours["filtered_resps"], strict=True)
    ]
    assert answers
    return answers


def far_apart(pair: Pair, texts: list[str], answers: Iterable[tuple[float, float]]) -> list[str]:
    """The texts whose two scores differ by more than rounding explains."""
    return [
        f"{theirs} {ours} {text}"
        for text, (theirs, ours) in zip(texts, answers, strict=True)
        if abs(ours - theirs) > pair.rounding(len(pair.hf.tok_encode(text)))
    ]


def test_a_multiple_choice_task_has_the_same_scores(pair):
    choices = [choice for row in rows("choice") for choice in row["choices"]]
    answers = samples(pair, "gemma_runtime_choice")
    for choice, ((theirs, their_greedy), (ours, our_greedy)) in zip(choices, answers, strict=True):
        assert ours == pytest.approx(theirs, abs=pair.rounding(len(pair.ours.tok_encode(choice))), rel=0)
        assert our_greedy == their_greedy
    theirs, ours = (of["results"]["gemma_runtime_choice"] for of in (pair.hf_scores, pair.our_scores))
    assert {"acc,none", "acc_norm,none"} <= theirs.keys()
    assert ours == theirs


def test_a_perplexity_task_has_the_same_scores(pair):
    answers = samples(pair, "gemma_runtime_rolling")
    texts = [row["text"] for row in rows("rolling")]
    assert far_apart(pair, texts, answers) == []
    allowed = sum(pair.rounding(len(pair.ours.tok_encode(text))) for text in texts)
    theirs, ours = (of["results"]["gemma_runtime_rolling"] for of in (pair.hf_scores, pair.our_scores))
    for unit, split in {"word": str.split, "byte": str.encode}.items():
        count = sum(len(split(text)) for text in texts)
        theirs_nats, our_nats = (math.log(of[f"{unit}_perplexity,none"]) for of in (theirs, ours))
        assert our_nats == pytest.approx(theirs_nats, abs=allowed / count, rel=0)


def test_a_generation_task_has_the_same_answers(pair):
    answers = samples(pair, "gemma_runtime_until")
    assert len({theirs for theirs, _ in answers}) > 1, "answers that are all the same would prove nothing"
    assert [ours for _, ours in answers] == [theirs for theirs, _ in answers]
    theirs, ours = (of["results"]["gemma_runtime_until"] for of in (pair.hf_scores, pair.our_scores))
    assert "exact_match,none" in theirs
    assert ours == theirs


@pytest.mark.parametrize("fault", ["no BOS", "a window one token shorter"])
def test_the_bound_is_tight_enough_to_refuse_another_rule(pair, monkeypatch, fault):
    if fault == "no BOS":
        plain = pair.ours.tok_encode
        monkeypatch.setattr(pair.ours, "tok_encode", lambda text, **options: plain(text, add_special_tokens=False))
    else:
        monkeypatch.setattr(pair.ours, "max_length", MAX_LENGTH - 1)
    texts = [row["text"] for row in rows("rolling")]
    ours = pair.ours.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    theirs = [theirs for theirs, _ in samples(pair, "gemma_runtime_rolling")]
    assert len(far_apart(pair, texts, zip(theirs, ours, strict=True))) >= 3


def test_greedy_continuations_are_told_from_others(pair):
    context = pair.ours.tok_encode(rows("rolling")[1]["text"])
    assert len(context) > MAX_LENGTH
    result = runtime.generate(pair.ours.model, context[-MAX_LENGTH + 5 :], max_new_tokens=5, ignore_eos=True)
    greedy = list(result.token_ids)
    others = [*greedy[:-1], (greedy[-1] + 1) % 499]
    wanted = [(None, context[-MAX_LENGTH + 5 :], ids) for ids in (greedy, others, greedy[:1], others[-1:])]
    wanted += [(None, context, greedy), (None, context, others[-1:])]  # too long
    theirs, ours = pair.hf._loglikelihood_tokens(wanted), pair.ours._loglikelihood_tokens(wanted)
    for (their_score, _), (our_score, _) in zip(theirs, ours, strict=True):
        assert our_score == pytest.approx(their_score, abs=pair.rounding(5), rel=0)
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]
    assert [flag for _, flag in ours[:3]] == [True, False, True]


def test_continuations_that_share_their_input_score_as_they_do_alone(pair):
    ids = pair.ours.tok_encode("one, two, one, two, one, two, one, two")
    wanted = [(None, ids[:at], [*ids[at:-1], last]) for at in (3, 6, len(ids) - 1) for last in (ids[-1], 300)]
    alone = [pair.ours._loglikelihood_tokens([one])[0] for one in wanted]
    assert [flag for _, flag in pair.ours._loglikelihood_tokens(wanted)] == [flag for _, flag in alone]
    for (together, _), (score, _) in zip(pair.ours._loglikelihood_tokens(wanted), alone, strict=True):
        assert together == pytest.approx(score, abs=pair.rounding(len(ids)), rel=0)


UNTIL = {
    "none": [],
    "text": ["the"],
    "over several tokens": [" the d"],
    "two that meet": ["e d", " the"],
    "a special token": ["<mask>"],
    "end of sequence": "<eos>",
}


@pytest.mark.parametrize("until", UNTIL.values(), ids=UNTIL)
def test_answers_are_cut_where_the_harness_cuts_them(pair, monkeypatch, until):
    """Both models are made to answer the same tokens."""
    encode = pair.ours.tok_encode
    said = [
        *encode("A river, the dog", add_special_tokens=False),
        4,
        *encode(" rises.", add_special_tokens=False),
        1,
        299,
    ]

    def their_generate(input_ids, stopping_criteria, **options):
        for token in said:
            input_ids = torch.cat([input_ids, torch.tensor([[token]])], dim=1)
            if bool(stopping_criteria(input_ids, None)):
                break
        return input_ids

    def our_generate(model, prompts, *, max_new_tokens, stop):
        answer = Answer(0, model.tokenizer, max_new_tokens, model.config.stop_token_ids, stop)
        for token in said:
            if answer.finish_reason is None:
                answer.take(token)
        return [answer]

    monkeypatch.setattr(pair.hf.model, "generate", their_generate)
    monkeypatch.setattr("runtime.lm_eval.model.generate", our_generate)
    asked = requests("generate_until", ("Two and two", {"until": until, "max_gen_toks": 24}))
    theirs, ours = pair.hf.generate_until(asked), pair.ours.generate_until(asked)
    assert ours == theirs


def test_a_batch_gives_the_answers_of_single_prompts(pair):
    contexts = [row["text"] for row in rows("rolling")]
    asked = requests("generate_until", *((context, {"until": ["."], "max_gen_toks": 12}) for context in contexts))
    asked += requests("generate_until", *((context, {"until": [","], "max_gen_toks": 7}) for context in contexts))
    together = GemmaRuntimeLM(pair.folder, max_length=MAX_LENGTH, batch_size="4", device="cpu")
    assert together.generate_until(asked) == pair.ours.generate_until(asked) == pair.hf.generate_until(asked)


TEXTS = [
    ("A river", " rises."),
    ("<bos>A river", " rises."),
    ("<bos>", "A river"),
    ("", "A river"),
    ("", "<bos>A river"),
    ("Two and ", "two"),
    ("Two\n", "\n and <eos>"),
    ("<mask> é雪", "<bos>"),
    ("one, two, " * 20, "one, two, " * 3),
]


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_the_same_texts_have_the_same_ids_scores_and_answers(pair, add_bos_token):
    hf, ours = pair.hf, pair.ours
    if add_bos_token is not None:
        hf = HFLM(pair.folder, **OPTIONS, **pair.attention, add_bos_token=add_bos_token)
        ours = GemmaRuntimeLM(pair.folder, **OPTIONS, add_bos_token=add_bos_token)
    for context, continuation in TEXTS:
        for text in (context, continuation, context + continuation):
            assert ours.tok_encode(text) == hf.tok_encode(text)
            assert ours.tok_encode(text, add_special_tokens=False) == hf.tok_encode(text, add_special_tokens=False)
    asked = requests("loglikelihood", *TEXTS)
    for text, theirs, mine in zip(TEXTS, hf.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=pair.rounding(MAX_LENGTH), rel=0), text
        assert mine[1] == theirs[1], text
    options = {"until": ["."], "max_gen_toks": 6}
    asked = requests("generate_until", *((context, options) for context, _ in TEXTS if context))
    assert ours.generate_until(asked) == hf.generate_until(asked)
    asked = requests("loglikelihood_rolling", *((context + continuation,) for context, continuation in TEXTS))
    for theirs, mine in zip(hf.loglikelihood_rolling(asked), ours.loglikelihood_rolling(asked), strict=True):
        assert mine == pytest.approx(theirs, abs=pair.rounding(2 * MAX_LENGTH), rel=0)


def test_a_text_that_begins_with_bos_gets_no_second_one(pair):
    bos = pair.ours.prefix_token_id
    for text in ("A river", "<bos>A river"):
        assert pair.ours.tok_encode(text).count(bos) == 1 and pair.ours.tok_encode(text)[0] == bos


def test_another_prefix_is_the_harness_s_too(pair):
    hf = HFLM(pair.folder, **OPTIONS, **pair.attention, prefix_token_id=4)
    ours = GemmaRuntimeLM(pair.folder, **OPTIONS, prefix_token_id=4)
    asked = requests("loglikelihood", ("", "A river"), ("<mask>Two", " and"))
    for theirs, mine in zip(hf.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert mine == pytest.approx(theirs, abs=pair.rounding(MAX_LENGTH), rel=0)
    with pytest.raises(ValueError, match="prefix_token_id must be from 0 to 498, got 499"):
        GemmaRuntimeLM(pair.folder, **OPTIONS, prefix_token_id=499)


NEUTRAL = {
    "beams": {"num_beams": 1},
    "penalties": {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0},
    "sampling that is off": {"do_sample": False, "temperature": 0.7, "top_k": 5, "top_p": 0.5},
    "no temperature": {"temperature": 0},
    "lengths": {"min_length": 0, "length_penalty": 2.0, "use_cache": True},
    "an empty stop string": {"until": [""]},
    "an empty stop string and another": {"until": ["", "."]},
    "no stop strings": {"until": None},
}


@pytest.mark.parametrize("options", NEUTRAL.values(), ids=NEUTRAL)
def test_what_changes_nothing_is_taken(pair, options):
    options = {"until": ["."], "max_gen_toks": 8} | options
    asked = requests("generate_until", ("Two and two", dict(options)), ("A river", dict(options)))
    answers = pair.ours.generate_until(asked)
    if options["until"] is None:  # where the `hf` model itself breaks
        options.pop("until")
    options.pop("use_cache", None)  # which it sets itself
    asked = requests("generate_until", ("Two and two", dict(options)), ("A river", dict(options)))
    assert answers == pair.hf.generate_until(asked)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0 with do_sample=True, got 0.0"),
        ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
        ({"temperature": 0.7, "typical_p": 0.9}, "expected typical_p=1.0, got typical_p=0.9"),
        ({"temperature": 0.7, "top_p": 0.0, "max_gen_toks": 8}, "top_p must be .* above 0"),
        ({"num_beams": 4}, "expected num_beams=1, got num_beams=4"),
        ({"encoder_repetition_penalty": 1.1}, "expected encoder_repetition_penalty=1.0, got"),
        ({"max_length": 30}, "expected no max_length, got max_length=30"),
        ({"nonsense": None}, "expected no nonsense, got nonsense=None"),
        ({"until": [1]}, r"until must be a string or a list of strings, got \[1\]"),
        ({"temperature": None}, "generation arguments .* are not the harness's"),
        ({"max_gen_toks": "many"}, "generation arguments .* are not the harness's"),
    ],
    ids=str,
)
def test_other_ways_of_decoding_are_refused(pair, option, message):
    with pytest.raises(runtime.GemmaRuntimeError, match=message):
        pair.ours.generate_until(requests("generate_until", ("Two and two", {"until": ["."], **option})))


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.7}, {"min_new_tokens": 7}], ids=str)
def test_greedy_answers_may_have_a_penalty_and_a_least_length(pair, option):
    asked = requests(
        "generate_until", *((text, {"until": ["."], "max_gen_toks": 8, **option}) for text, _ in TEXTS[:2])
    )
    assert pair.ours.generate_until(asked) == pair.hf.generate_until(asked)


def test_answers_are_drawn_with_the_harness_s_seed(pair):
    def answers(seed, model=pair.ours, **options):
        options = {"until": [], "max_gen_toks": 8, "do_sample": True, **options}
        torch.manual_seed(seed)
        return model.generate_until(requests("generate_until", *(("A river", dict(options)) for _ in range(6))))

    first = answers(1)
    assert answers(1) == first != answers(2) and len(set(first)) > 1
    likeliest = answers(1, top_k=1)
    assert likeliest == answers(2, temperature=0.3, top_p=1e-6) == answers(1, do_sample=False)
    assert likeliest == answers(1, model=pair.hf, top_k=1, temperature=1.0)


def test_drawing_follows_the_checkpoint_where_a_task_does_not_say(tmp_path):
    given = {"do_sample": True}
    assert arguments.sampling_defaults(tmp_path) == {}
    assert arguments.read_generation_arguments(given, "<eos>", 999, {}).choice == {"temperature": 1.0, "top_k": 50}
    (tmp_path / "generation_config.json").write_text('{"top_k": 64, "top_p": 0.95, "do_sample": true}')
    defaults = arguments.sampling_defaults(tmp_path)
    choice = arguments.read_generation_arguments(given | {"top_p": 0.5}, "<eos>", 999, defaults).choice
    assert choice == {"temperature": 1.0, "top_k": 64, "top_p": 0.5}
    assert arguments.read_generation_arguments({}, "<eos>", 999, defaults).choice == {}


def test_no_room_for_an_answer_is_an_error(pair):
    with pytest.raises(ValueError, match=f"max_gen_toks must be from 1 to {MAX_LENGTH - 1}, got {MAX_LENGTH}"):
        pair.ours.generate_until(requests("generate_until", ("Two and two", {"max_gen_toks": MAX_LENGTH})))
    with pytest.raises(ValueError, match=f"continuation must be from 1 to {MAX_LENGTH}, got 100"):
        pair.ours._loglikelihood_tokens([(None, [2], [5] * 100)])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 65}, "batch_size must be from 1 to 64, got 65"),
        ({"batch_size": "auto:x"}, "batch_size must be a number from 1 to 64 or \"auto\", got 'auto:x'"),
        ({"batch_size": "²"}, "batch_size must be a number from 1 to 64"),
        ({"batch_size": "auto", "max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"softmax_dtype": "float64"}, "softmax_dtype must be one of .*, got 'float64'"),
        ({"dtype": "torch.int8"}, "dtype must be one of .*, got 'torch.int8'"),
        ({"device": "cuda-0"}, "device must be .*, got 'cuda-0'"),
        ({"device": "mps"}, "device must be .*, got 'mps'"),
        ({"device": "cuda:99"}, "'cuda:99' was asked for"),
        ({"add_bos_token": "yes"}, "add_bos_token must be True, False or None, got 'yes'"),
        ({"trust_remote_code": True}, "trust_remote_code: expected False, got True"),
        ({"peft": "a/b"}, "peft: expected None, got 'a/b'"),
        ({"load_in_4bit": True}, "gemma-runtime has no argument load_in_4bit, got load_in_4bit=True"),
        ({"revision": "v1"}, "a revision goes with a hub id"),
        ({"revision": "a b"}, "a revision must be"),
        ({"quantize": "nf4"}, "quantize must be None or one of .*, got 'nf4'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(pair, option, message):
    with pytest.raises(ValueError, match=message):
        GemmaRuntimeLM(pair.folder, **option)


def test_without_the_harness_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "runtime.lm_eval")
    with pytest.raises(ModuleNotFoundError, match=r"needs the eval extra \(pip install 'gemma-runtime\[eval\]'\)"):
        importlib.import_module("runtime.lm_eval")


def test_a_model_without_a_tokenizer_is_refused(small_pair):
    with pytest.raises(ValueError, match=r"the harness works on text, but .* has no tokenizer"):
        GemmaRuntimeLM(small_pair("gemma3").hf.name_or_path)


@pytest.mark.parametrize(
    "option",
    [
        {"device": None},
        {"device": torch.device("cpu")},
        {"dtype": torch.float32},
        {"dtype": "torch.float32"},
        {"dtype": None},
        {"softmax_dtype": torch.float32},
        {"revision": "main", "trust_remote_code": False, "parallelize": False, "backend": "causal", "peft": None},
        {"batch_size": "auto:4", "max_batch_size": 2},
        {"batch_size": None},
    ],
    ids=str,
)
def test_options_are_taken_as_the_harness_gives_them(small_pair, option):
    folder = small_pair("gemma3", seed=7).hf.name_or_path
    write_tokenizer(folder)
    model = GemmaRuntimeLM(folder, **(OPTIONS | option))
    assert model.batch_size == (2 if option.get("batch_size") else 1)
    assert model.model.dtype == torch.float32 and model.device == torch.device("cpu")


@pytest.mark.newest_only
def test_quantised_weights_have_the_scores_of_their_values(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    packed = pack_model(save_plain_model("gemma3", tmp_path / "plain"), Variant("gptq"))
    values = Packed(
        {name: value for name, value in packed.config.items() if name != "quantization_config"},
        {name: torch.from_numpy(value) for name, value in packed.values.items()},
    )
    folders = [packed.write(tmp_path / "packed"), values.write(tmp_path / "values")]
    for folder in folders:
        write_tokenizer(str(folder))
    ours, theirs = (GemmaRuntimeLM(folder, eager=True, **OPTIONS) for folder in folders)
    assert (ours.model.weights.formats, theirs.model.weights.formats) == ("BF16 + Q4_0_BF16", "")
    wanted = [(None, list(range(9, 20)), [30, 40, 50]), (None, [7], [8])]
    assert ours._loglikelihood_tokens(wanted) == theirs._loglikelihood_tokens(wanted)
    assert GemmaRuntimeLM(folders[1], quantize="int8", **OPTIONS).model.weights.formats == "INT8"


def test_auto_takes_the_rows_that_fit(small_pair, monkeypatch):
    folder = small_pair("gemma3", seed=7).hf.name_or_path
    write_tokenizer(folder)
    one, five = (resolve(folder, device="cpu", max_seq_len=MAX_LENGTH, max_batch=rows).plan for rows in (1, 5))
    monkeypatch.setattr("runtime.model.memory_plan.available_bytes", lambda device: 2 * five.total - five.weights)
    for most, expected in ((None, 5), (3, 3), (9, 5)):
        assert GemmaRuntimeLM(folder, **OPTIONS, batch_size="auto", max_batch_size=most).batch_size == expected
    monkeypatch.setattr("runtime.model.memory_plan.available_bytes", lambda device: one.total)
    assert GemmaRuntimeLM(folder, **OPTIONS, batch_size="auto").batch_size == 1
    with pytest.raises(runtime.NotEnoughMemory):
        GemmaRuntimeLM(folder, **OPTIONS, batch_size=5)


CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}
{{ raise_exception('no system role') }}{% endif %}{{ '<mask>' + message['role'] + ': ' + message['content'] + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<mask>model: ' }}{% endif %}"""


@pytest.fixture(scope="module")
def chatting(small_pair, tmp_path_factory):
    """Both models of a checkpoint with a chat template."""
    folder = small_pair("gemma3", seed=8).hf.name_or_path
    write_tokenizer(folder)
    (Path(folder) / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return HFLM(folder, **OPTIONS), GemmaRuntimeLM(folder, **OPTIONS)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chats_have_the_same_scores(chatting, monkeypatch, tmp_path, system):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    manager = TaskManager(include_path=str(HERE), include_defaults=False)
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 1, "limit": 2}
    options |= {"task_manager": manager, "bootstrap_iters": 0, "system_instruction": system}
    tasks = ["gemma_runtime_choice", "gemma_runtime_until"]
    theirs, ours = (lm_eval.simple_evaluate(model, tasks=tasks, **options) for model in chatting)
    for task in tasks:
        for their, our in zip(theirs["samples"][task], ours["samples"][task], strict=True):
            assert our["arguments"] == their["arguments"]
            assert "<mask>" in str(our["arguments"]) and str(our["arguments"]).count("<bos>") >= 1
            for answers in zip(their["filtered_resps"], our["filtered_resps"], strict=True):
                their_answer, our_answer = answers
                if isinstance(our_answer, str):
                    assert our_answer == their_answer
                else:
                    assert our_answer[0] == pytest.approx(their_answer[0], abs=1e-3, rel=0)


def test_a_chat_is_rendered_as_the_harness_renders_it(chatting):
    hf, ours = chatting
    user, answer = {"role": "user", "content": "Two and two?"}, {"role": "model", "content": "Fo"}
    for messages, prompted in (([user], True), ([user, answer], False), ([user, answer, user], True)):
        rendered = ours.apply_chat_template(messages, add_generation_prompt=prompted)
        assert rendered == hf.apply_chat_template(messages, add_generation_prompt=prompted)
    assert ours.tokenizer_name == hf.tokenizer_name
    assert ours.chat_template(True) == hf.chat_template(True) == CHAT_TEMPLATE
    with pytest.raises(ValueError, match=r"the chat template of .* cannot be applied: "):
        ours.apply_chat_template([{"role": "user"}])


def test_a_model_without_a_template_cannot_chat(pair):
    with pytest.raises(runtime.GemmaRuntimeError, match=r"chat template of .* cannot be applied: ") as caught:
        pair.ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ("pretrained=/no/such/folder", {}, "no model at /no/such/folder"),
        ("pretrained={folder}", {"device": "cuda-0"}, "device must be"),
        ("pretrained={folder},dtyp=float32", {}, "gemma-runtime has no argument dtyp"),
        ("pretrained={folder}", {"batch_size": "65"}, "batch_size must be from 1 to 64, got 65"),
        ("pretrained={folder},max_length=513", {}, "max_position_embeddings"),
    ],
    ids=["folder", "device", "argument", "batch", "length"],
)
def test_the_command_line_complains_in_one_line(small_pair, monkeypatch, capsys, arguments, more, message):
    """What the harness's command line does with its arguments, without its tasks, which take it half a minute."""
    folder = small_pair("gemma3", seed=7).hf.name_or_path
    write_tokenizer(folder)
    given = arguments.format(folder=folder)
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: GemmaRuntimeLM.create_from_arg_string(given, {"device": "cpu"} | more)
    )
    assert main() == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("gemma-runtime: error: ") and message in complaint and complaint.count("\n") == 1


def test_the_longest_sequence_is_the_checkpoint_s(pair):
    assert GemmaRuntimeLM(pair.folder, device="cpu", batch_size="auto").max_length == 512


@pytest.mark.newest_only
def test_the_harness_s_command_line_knows_the_model(small_pair, tmp_path):
    folder = small_pair("gemma3", seed=7).hf.name_or_path
    write_tokenizer(folder)
    arguments = ["--model", "gemma-runtime", "--model_args", f"pretrained={folder},max_length={MAX_LENGTH}"]
    arguments += ["--include_path", ".", "--tasks", ",".join(TASKS), "--limit", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "runtime.lm_eval", *arguments],
        cwd=HERE,
        env=os.environ | OFFLINE | {"HF_HOME": str(tmp_path), "PYTHONSAFEPATH": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for metric in ("acc_norm", "byte_perplexity", "exact_match"):
        assert metric in done.stdout


def test_the_tasks_of_the_quality_benchmark() -> None:
    rows = {"last_word": quality.last_words(8), "docstring": quality.docstrings(8)}
    known = {row["before"]: f" {row['word']}" for row in rows["last_word"][:6]}
    known |= {row["definition"]: f" {row['choices'][row['answer']]}" for row in rows["docstring"][:4]}

    class Knows(lm_eval.api.model.LM):
        """Knows six of the last words and four of the docstrings, and finds the answers to the others unlikely."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            asked = [(context.removesuffix("\n   "), answer) for context, answer in (one.args for one in requests)]
            right = [known.get(context) == answer for context, answer in asked]
            wrong = {row["definition"]: f" {row['choices'][row['answer']]}" for row in rows["docstring"][4:]}
            worst = [wrong.get(context) == answer for context, answer in asked]
            return [
                (-0.0 if is_right else -1000.0 if is_worst else -10.0, is_right)
                for is_right, is_worst in zip(right, worst, strict=True)
            ]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    scores = quality.scores(Knows(), rows)
    assert scores["last_word acc"] == 0.75 and scores["docstring acc_norm"] == 0.5
    assert scores["last_word perplexity"] == pytest.approx(math.exp(2 * 10 / 8))

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

from runtime.answer import Answer  # noqa: E402
from runtime.lm_eval import GemmaRuntimeLM  # noqa: E402

HERE = Path(__file__).parent
TASKS = {"gemma_runtime_choice": "choice", "gemma_runtime_rolling": "rolling", "gemma_runtime_until": "until"}
MAX_LENGTH = 48  # so that some contexts lose their beginning, and most texts need several windows
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]


@dataclass
class Sides:
    """One checkpoint in the harness's own model and in ours."""

    folder: str
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
        log_softmax and the sum over tokens round themselves is added for both sides. A softcap only lowers it.
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
def sides(request, small_pair, tmp_path_factory) -> Sides:
    folder = small_pair(request.param, seed=7).hf.name_or_path
    write_tokenizer(folder)
    options = {"pretrained": folder, "dtype": "float32", "device": "cpu", "max_length": MAX_LENGTH}
    attention = {"attn_implementation": "eager"} if request.param == "gemma2" else {}
    manager = TaskManager(include_path=str(HERE), include_defaults=False)

    def evaluate(model: Any) -> dict[str, Any]:
        return lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HERE)  # the tasks name their files without a folder
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        hf, ours = HFLM(**options, **attention), GemmaRuntimeLM(**options)
        return Sides(folder, hf, ours, evaluate(hf), evaluate(ours))


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


def samples(sides: Sides, task: str) -> list[tuple[Any, Any]]:
    """What each side answered to each request of a task, in order."""
    pairs = zip(sides.hf_scores["samples"][task], sides.our_scores["samples"][task], strict=True)
    answers = [
        answer
        for theirs, ours in pairs
        for answer in zip(theirs["filtered_resps"], ours["filtered_resps"], strict=True)
    ]
    assert answers
    return answers


def far_apart(sides: Sides, texts: list[str], answers: Iterable[tuple[float, float]]) -> list[str]:
    """The texts whose two scores differ by more than rounding explains."""
    return [
        f"{theirs} {ours} {text}"
        for text, (theirs, ours) in zip(texts, answers, strict=True)
        if abs(ours - theirs) > sides.rounding(len(sides.hf.tok_encode(text)))
    ]


def test_a_multiple_choice_task_has_the_same_scores(sides):
    choices = [choice for row in rows("choice") for choice in row["choices"]]
    answers = samples(sides, "gemma_runtime_choice")
    for choice, ((theirs, their_greedy), (ours, our_greedy)) in zip(choices, answers, strict=True):
        assert ours == pytest.approx(theirs, abs=sides.rounding(len(sides.ours.tok_encode(choice))), rel=0)
        assert our_greedy == their_greedy
    theirs, ours = (of["results"]["gemma_runtime_choice"] for of in (sides.hf_scores, sides.our_scores))
    assert {"acc,none", "acc_norm,none"} <= theirs.keys()
    assert ours == theirs


def test_a_perplexity_task_has_the_same_scores(sides):
    answers = samples(sides, "gemma_runtime_rolling")
    texts = [row["text"] for row in rows("rolling")]
    assert far_apart(sides, texts, answers) == []
    allowed = sum(sides.rounding(len(sides.ours.tok_encode(text))) for text in texts)
    theirs, ours = (of["results"]["gemma_runtime_rolling"] for of in (sides.hf_scores, sides.our_scores))
    for unit, split in {"word": str.split, "byte": str.encode}.items():
        count = sum(len(split(text)) for text in texts)
        theirs_nats, our_nats = (math.log(of[f"{unit}_perplexity,none"]) for of in (theirs, ours))
        assert our_nats == pytest.approx(theirs_nats, abs=allowed / count, rel=0)


def test_a_generation_task_has_the_same_answers(sides):
    answers = samples(sides, "gemma_runtime_until")
    assert len({theirs for theirs, _ in answers}) > 1, "answers that are all the same would prove nothing"
    assert [ours for _, ours in answers] == [theirs for theirs, _ in answers]
    theirs, ours = (of["results"]["gemma_runtime_until"] for of in (sides.hf_scores, sides.our_scores))
    assert "exact_match,none" in theirs
    assert ours == theirs


@pytest.mark.parametrize("fault", ["no BOS", "a window one token shorter"])
def test_the_bound_is_tight_enough_to_refuse_another_rule(sides, monkeypatch, fault):
    if fault == "no BOS":
        plain = sides.ours.tok_encode
        monkeypatch.setattr(sides.ours, "tok_encode", lambda text, **options: plain(text, add_special_tokens=False))
    else:
        monkeypatch.setattr(sides.ours, "max_length", MAX_LENGTH - 1)
    texts = [row["text"] for row in rows("rolling")]
    ours = sides.ours.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    theirs = [theirs for theirs, _ in samples(sides, "gemma_runtime_rolling")]
    assert len(far_apart(sides, texts, zip(theirs, ours, strict=True))) >= 3


def test_greedy_continuations_are_told_from_others(sides):
    context = sides.ours.tok_encode(rows("rolling")[1]["text"])
    assert len(context) > MAX_LENGTH
    greedy = runtime.generate(sides.ours.model, context[-MAX_LENGTH + 5 :], max_new_tokens=5, ignore_eos=True).token_ids
    others = [*greedy[:-1], (greedy[-1] + 1) % 499]
    wanted = [(None, context[-MAX_LENGTH + 5 :], ids) for ids in (greedy, others, greedy[:1], others[-1:])]
    wanted += [(None, context, greedy), (None, context, others[-1:])]  # too long
    theirs, ours = sides.hf._loglikelihood_tokens(wanted), sides.ours._loglikelihood_tokens(wanted)
    for (their_score, _), (our_score, _) in zip(theirs, ours, strict=True):
        assert our_score == pytest.approx(their_score, abs=sides.rounding(5), rel=0)
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]
    assert [flag for _, flag in ours[:3]] == [True, False, True]


def test_continuations_that_share_their_input_score_as_they_do_alone(sides):
    ids = sides.ours.tok_encode("one, two, one, two, one, two, one, two")
    wanted = [(None, ids[:at], [*ids[at:-1], last]) for at in (3, 6, len(ids) - 1) for last in (ids[-1], 300)]
    alone = [sides.ours._loglikelihood_tokens([one])[0] for one in wanted]
    assert [flag for _, flag in sides.ours._loglikelihood_tokens(wanted)] == [flag for _, flag in alone]
    for (together, _), (score, _) in zip(sides.ours._loglikelihood_tokens(wanted), alone, strict=True):
        assert together == pytest.approx(score, abs=sides.rounding(len(ids)), rel=0)


UNTIL = {
    "none": [],
    "text": ["the"],
    "over several tokens": [" the d"],
    "two that meet": ["e d", " the"],
    "a special token": ["<mask>"],
    "end of sequence": "<eos>",
}


@pytest.mark.parametrize("until", UNTIL.values(), ids=UNTIL)
def test_answers_are_cut_where_the_harness_cuts_them(sides, monkeypatch, until):
    """Both models are made to say the same."""
    encode = sides.ours.tok_encode
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

    monkeypatch.setattr(sides.hf.model, "generate", their_generate)
    monkeypatch.setattr("runtime.lm_eval.generate", our_generate)
    asked = requests("generate_until", ("Two and two", {"until": until, "max_gen_toks": 24}))
    theirs, ours = sides.hf.generate_until(asked), sides.ours.generate_until(asked)
    assert ours == theirs


def test_a_batch_gives_the_answers_of_one_by_one(sides):
    contexts = [row["text"] for row in rows("rolling")]
    asked = requests("generate_until", *((context, {"until": ["."], "max_gen_toks": 12}) for context in contexts))
    asked += requests("generate_until", *((context, {"until": [","], "max_gen_toks": 7}) for context in contexts))
    together = GemmaRuntimeLM(sides.folder, max_length=MAX_LENGTH, batch_size="4", device="cpu")
    assert together.generate_until(asked) == sides.ours.generate_until(asked) == sides.hf.generate_until(asked)


@pytest.mark.parametrize("option", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}])
def test_what_is_not_greedy_is_refused(sides, option):
    with pytest.raises(ValueError, match="decodes greedily: expected do_sample=False"):
        sides.ours.generate_until(requests("generate_until", ("Two and two", {"until": ["."], **option})))


def test_no_room_for_an_answer_is_an_error(sides):
    with pytest.raises(ValueError, match=f"max_gen_toks must be from 1 to {MAX_LENGTH - 1}, got {MAX_LENGTH}"):
        sides.ours.generate_until(requests("generate_until", ("Two and two", {"max_gen_toks": MAX_LENGTH})))
    with pytest.raises(ValueError, match=f"continuation must be from 1 to {MAX_LENGTH}, got 100"):
        sides.ours._loglikelihood_tokens([(None, [2], [5] * 100)])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 9}, "batch_size must be from 1 to 8, got 9"),
        ({"batch_size": "auto:2"}, "batch_size must be a number from 1 to 8 or \"auto\", got 'auto:2'"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"softmax_dtype": "float64"}, "softmax_dtype must be one of .*, got 'float64'"),
    ],
)
def test_options_out_of_range_are_refused(sides, option, message):
    with pytest.raises(ValueError, match=message):
        GemmaRuntimeLM(sides.folder, **option)


def test_without_the_harness_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "runtime.lm_eval")
    with pytest.raises(ModuleNotFoundError, match=r"needs the eval extra \(pip install 'gemma-runtime\[eval\]'\)"):
        importlib.import_module("runtime.lm_eval")


def test_a_model_without_a_tokenizer_is_refused(small_pair):
    with pytest.raises(ValueError, match=r"the harness works on text, but .* has no tokenizer"):
        GemmaRuntimeLM(small_pair("gemma3").hf.name_or_path)


def test_the_longest_sequence_is_the_checkpoint_s(sides):
    assert GemmaRuntimeLM(sides.folder, device="cpu", batch_size="auto").max_length == 512


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

"""The transcript this project began with: gemma-1.1-2b-it in fp16, step by step, as Hugging Face printed it.

Runs where GEMMA_RUNTIME_SEED_CHECKPOINT names that checkpoint, as anything `runtime.load` takes.
"""

import os

import pytest

import runtime

SOURCE = os.environ.get("GEMMA_RUNTIME_SEED_CHECKPOINT")
PROMPT = "A dog running through the snow"
PROMPT_IDS = [2, 235280, 5929, 5327, 1593, 573, 8529]
BEST = {235269: 5.83, 603: 5.22, 235265: 4.92, 675: 4.72, 18460: 4.67}  # id: logit, best first
CONTINUATION = [
    235269, 1277, 92381, 10317, 18631, 575, 573, 97459, 2674, 15487, 235265, 109, 688,
    50721, 573, 2416, 575, 978, 8637, 116742, 109, 688, 19268, 34762, 66058, 109,
]  # fmt: skip

pytestmark = pytest.mark.skipif(not SOURCE, reason="GEMMA_RUNTIME_SEED_CHECKPOINT does not name a gemma-1.1-2b-it")


@pytest.fixture(scope="module")
def model():
    return runtime.load(SOURCE, dtype="float16", max_seq_len=256)


def test_prompt_ids(model):
    assert model.config.family == "gemma"
    assert model.tokenizer.encode(PROMPT) == PROMPT_IDS


def test_best_candidates_after_the_prompt(model):
    (last,) = runtime.inspect(model, PROMPT, top_k=5, positions=[-1]).positions
    assert [candidate.id for candidate in last.candidates] == list(BEST)
    # Half a unit of the transcript's last digit, and two of fp16's at this size: devices sum in different orders.
    assert [candidate.logit for candidate in last.candidates] == pytest.approx(list(BEST.values()), abs=0.005 + 2 / 256)


def test_greedy_continuation(model):
    result = runtime.generate(model, PROMPT, max_new_tokens=len(CONTINUATION), ignore_eos=True)
    assert list(result.prompt_token_ids) == PROMPT_IDS
    assert list(result.token_ids) == CONTINUATION


def test_step_by_step_takes_the_same_tokens(model):
    steps = runtime.inspect(model, PROMPT, steps=len(CONTINUATION)).steps
    assert [step.id for step in steps] == CONTINUATION[: len(steps)]
    assert min(step.margin for step in steps) >= 0

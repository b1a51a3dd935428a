"""The demo model, Gemma 3 270M, end to end: the tokens Hugging Face's greedy run picks, alone and in a batch."""

import gc
from dataclasses import dataclass

import pytest
import torch
import transformers
from packaging.version import Version

import runtime
from runtime.checkpoint import sources

NEW_TOKENS = 32
WINDOW = 512


def logbook(entries):
    """English prose of about 38 tokens an entry, long enough to pass the sliding window, that never repeats itself."""
    winds, seas = ("north", "north-east", "east", "south-west", "west"), ("calm", "slight", "moderate", "rough")
    sights = ("two fin whales to port", "a trawler hull down", "nothing but terns", "drift ice", "the light at Skagen")
    return "The logbook of the Albatross.\n" + "".join(
        f"Day {day}, {day * 7 % 24:02d}:{day * 13 % 60:02d}. Wind {winds[day % 5]} {6 + day * 5 % 23} knots, sea "
        f"{seas[day * 3 % 4]}, pressure {990 + day * 11 % 37} hPa. Sighted {sights[day * 2 % 5]}.\n"
        for day in range(1, entries + 1)
    )


PROMPTS = {
    "seed": "A dog running through the snow is",
    "python": "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n",
    "sql": "-- the ten customers who spent most in 2023\nSELECT customers.name, SUM(orders.total) AS spent\nFROM",
    "french": "Au petit matin, le boulanger du village ouvre sa boutique et",
    "chinese": "长城是中国古代的伟大建筑,它的历史可以追溯到",
    "russian": "Зимой в Сибири очень холодно, поэтому люди",
    "hindi": "भारत की राजधानी नई दिल्ली है और यहाँ",
    "degenerate": "the the the the the the the the",
    "past_window": logbook(14),
    "past_two_windows": logbook(33),
}


# What runs on every stack; the other prompts are left to the newest.
QUICK = ("seed", "python", "past_window")
MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.newest_only) for name in PROMPTS]


@dataclass
class Greedy:
    """One greedy run of Hugging Face: the new tokens and, for each, the two best logits before it."""

    tokens: list[int]
    top2: list[list[float]]


class Demo:
    """Both implementations of the demo model in one dtype, each prompt run once by each.

    In fp32 ours decodes as it does by default. In bf16 by the reference operations, whose bits are Hugging Face's: what
    compiled kernels make of bf16 is judged by the audit (tests/verify).
    """

    def __init__(self, dtype):
        self.dtype, eager = dtype, dtype == "bfloat16"
        self.model = runtime.load("demo", device="cpu", dtype=dtype, max_seq_len=2048, max_batch=4, eager=eager)
        self.hugging_face = transformers.AutoModelForCausalLM.from_pretrained(
            sources.resolve("demo"), dtype=getattr(torch, dtype)
        )
        self.hugging_face.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
        self._expected, self._ours = {}, {}

    def ids(self, name):
        return self.model.tokenizer.encode(PROMPTS[name])

    def expected(self, name):
        if name not in self._expected:
            ids = torch.tensor([self.ids(name)])
            run = self.hugging_face.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS)
            tokens = run.sequences[0, ids.shape[1] :].tolist()
            self._expected[name] = Greedy(tokens, [row[0].float().topk(2).values.tolist() for row in run.logits])
        return self._expected[name]

    def ours(self, name):
        if name not in self._ours:
            result = runtime.generate(self.model, PROMPTS[name], max_new_tokens=NEW_TOKENS, ignore_eos=True)
            self._ours[name] = list(result.token_ids)
        return self._ours[name]

    def mismatch(self, ours, expected):
        """Where two runs part, in words; None where they do not."""
        if ours == expected.tokens:
            return None
        pairs = zip(ours, expected.tokens, strict=False)
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(expected.tokens)))
        texts = [f"{run[step]} {self.model.tokenizer.piece(run[step])!r}" if step < len(run) else "nothing"
                 for run in (ours, expected.tokens)]  # fmt: skip
        first, second = expected.top2[min(step, NEW_TOKENS - 1)]
        return (
            f"{self.dtype}, transformers {transformers.__version__}, torch {torch.__version__}: at new token {step} "
            f"ours is {texts[0]}, Hugging Face's {texts[1]}; its two best logits are {first} and {second}, "
            f"margin {first - second:.6g}"
        )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def demo(request):
    # One dtype at a time: a second pair of models would hold another 3 GB.
    yield Demo(request.param)
    gc.collect()


def test_prompts_pass_the_window_as_they_claim(demo):
    lengths = {name: len(demo.ids(name)) for name in PROMPTS}
    assert len(PROMPTS) == 10
    assert lengths["past_window"] > WINDOW
    assert lengths["past_two_windows"] > 1200
    assert sum(length > WINDOW for length in lengths.values()) == 2


@pytest.mark.parametrize("name", MARKED)
def test_tokens_equal_hugging_face(demo, name):
    if (
        demo.dtype == "bfloat16"
        and len(demo.ids(name)) > WINDOW
        and Version(transformers.__version__) < Version("5.23")
    ):
        pytest.skip("query heads under a mask are grouped as in transformers 5.23; older ones sum in another order")
    expected = demo.expected(name)
    assert len(expected.tokens) == NEW_TOKENS
    difference = demo.mismatch(demo.ours(name), expected)
    assert difference is None, f"{name}: {difference}"


@pytest.mark.newest_only  # as small models' with the oldest too
def test_batch_rows_equal_their_solo_runs(demo):
    batch = runtime.generate(demo.model, [PROMPTS[name] for name in QUICK], max_new_tokens=24, ignore_eos=True)
    for name, row in zip(QUICK, batch, strict=True):
        assert list(row.token_ids) == demo.ours(name)[:24], name


def test_a_mismatch_names_step_tokens_and_margin(demo):
    """The comparison can fail, and says what one needs to judge the failure."""
    expected = demo.expected("seed")
    other = [*expected.tokens[:5], expected.tokens[5] + 1, *expected.tokens[6:]]
    message = demo.mismatch(other, expected)
    assert "at new token 5" in message
    assert str(expected.tokens[5]) in message and str(other[5]) in message
    assert "margin" in message

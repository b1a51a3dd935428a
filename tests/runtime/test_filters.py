"""Which tokens filters leave, against transformers' own warpers, and how often each of those is then drawn."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from transformers.generation import logits_process as theirs

from runtime.kernels.gumbel import philox_of_ids_torch, philox_torch, scores_torch
from runtime.sampling.choice import draw
from runtime.sampling.filters import kept
from runtime.sampling.params import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.999},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 300, "min_p": 0.01},
    {"top_p": 0.8, "min_p": 0.1},
    {"top_k": 64, "top_p": 0.95, "min_p": 0.05},
]


def warped(logits: torch.Tensor, temperature: float, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """What transformers draws from, [vocab] fp32, in the order of its `generate`."""
    scores = theirs.TemperatureLogitsWarper(temperature)(None, logits[None].clone())
    if top_k:
        scores = theirs.TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None and top_p < 1:
        scores = theirs.TopPLogitsWarper(top_p)(None, scores)
    if min_p is not None:
        scores = theirs.MinPLogitsWarper(min_p)(None, scores)
    return scores[0]


def logits_of(kind: str, vocab: int, seed: int) -> torch.Tensor:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "ties":  # as bf16 makes them, coarser
        return (logits * 2).round() / 2
    if kind == "banned":
        logits[::3] = -torch.inf
    return logits


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "banned"])
def test_filters_leave_what_transformers_leaves(kind, setting):
    for vocab, seed, temperature in ((50, 1, 1.0), (2000, 2, 0.7), (30000, 3, 1.6)):
        logits = logits_of(kind, vocab, seed)
        expected = warped(logits, temperature, **setting).isfinite().nonzero()[:, 0]
        found = kept(logits / temperature, **{"top_k": None, "top_p": None, "min_p": None} | setting)
        if kind == "ties":  # transformers' sort leaves it open which of equals top-p keeps
            assert torch.equal(logits[found].sort().values, logits[expected].sort().values)
            last = found[logits[found] == logits[found].min()]
            assert torch.equal(last, (logits == logits[found].min()).nonzero()[: len(last), 0]), "the lower ids"
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 5e-324}, {"top_p": 1 - 2**-53}, {"min_p": 1.0}], ids=str)
@pytest.mark.parametrize("temperature", [5e-324, 1.0, 1.7e308])
@pytest.mark.parametrize("scale", [1.0, 3e37])
def test_something_is_left_to_draw_from_at_every_end_of_every_range(scale, temperature, setting):
    """Penalties may make logits as great as fp32 has."""
    logits = logits_of("banned", 50, 7) * scale
    token = draw(logits, SamplingParams(temperature, seed=3, **setting), 0)
    assert logits[token].isfinite()
    if scale == 1 and temperature < 1:
        assert logits[token] == logits.max()


def test_the_highest_temperatures_draw_from_all():
    logits = logits_of("plain", 50, 8)
    assert len({draw(logits, SamplingParams(1.7e308, seed=3), at) for at in range(99)}) > 30


def test_top_p_counts_exactly():
    """Masses of 2^40 and more, of which one is a unit more or less than the share: fp32 has 24 bits."""
    z = torch.tensor([0.0, 0.0, -20.0])
    third = int(torch.tensor(-20.0).exp() * 2**40)
    assert kept(z, None, 2**41 / (2**41 + third), None).tolist() == [0, 1]
    assert kept(z, None, (2**41 + 1) / (2**41 + third), None).tolist() == [0, 1, 2]


def test_what_is_left_depends_on_no_threads():
    logits = logits_of("plain", 262_144, 4)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(kept(logits, None, 0.97, None))
    assert len(found[0]) > 4096, "more than the first tries sort"
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_noise_of_some_tokens_is_that_of_all():
    seed, position = torch.tensor(-(2**63) + 12345), torch.tensor(77, dtype=torch.int32)
    ids = torch.tensor([0, 1, 2, 3, 5, 4093, 262_143])
    assert torch.equal(philox_of_ids_torch(ids, seed, position), philox_torch(262_144, seed, position)[ids])


@pytest.mark.parametrize(
    "setting", [{"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 12, "top_p": 0.9}], ids=str
)
@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_draws_have_the_distribution_that_is_left(setting, temperature):
    """A chi-square test of 100,000 draws; a temperature that is wrong by 5 % fails it."""
    count, logits = 100_000, logits_of("plain", 40, 5) / 2
    ids = kept(logits / temperature, *(setting.get(name) for name in ("top_k", "top_p", "min_p")))
    inverse = torch.tensor(1 / temperature, dtype=torch.float32)
    positions = torch.arange(count, dtype=torch.int32)[:, None]
    drawn = ids[scores_torch(logits[ids], torch.tensor(3), positions, inverse, ids).argmax(dim=1)]
    seen = torch.bincount(drawn, minlength=40)[ids]

    def fits(at: float) -> float:
        shares = warped(logits.double(), at, **setting)[ids].softmax(dim=0)
        return stats.chisquare(seen, shares * count).pvalue

    assert len(ids) > 2 and fits(temperature) > 1e-3
    assert len(ids) < 5 or fits(temperature * 1.05) < 1e-6
    params = SamplingParams(temperature, seed=3, **setting)
    assert [draw(logits, params, at) for at in range(20)] == drawn[:20].tolist()


def test_a_filtered_draw_is_the_whole_draw_where_that_is_left():
    logits = logits_of("plain", 5000, 6)
    whole = [draw(logits, SamplingParams(1.0, seed=9), at) for at in range(60)]
    ids = kept(logits, 20, None, None)
    filtered = [draw(logits, SamplingParams(1.0, top_k=20, seed=9), at) for at in range(60)]
    same = [a == b for a, b in zip(whole, filtered, strict=True) if a in ids]
    assert len(same) > 5 and all(same) and set(filtered) <= set(ids.tolist())

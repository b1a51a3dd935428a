"""The noise that makes an argmax a sample: the same bits in every backend, independent, and of Gumbel's distribution.

Where Triton's kernels run, on a GPU or in the interpreter, they are the backend; elsewhere PyTorch and numba are.
"""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from runtime.check.case import DEVICE
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.gumbel import (
    log_of_exponential,
    log_of_exponential_torch,
    philox_torch,
    philox_words,
    scores_of,
    scores_torch,
)
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.triton_function import cdiv, jit, tl

RUNS_TRITON = INTERPRETING or DEVICE == "cuda"
BACKENDS = ["triton"] if RUNS_TRITON else ["torch", "numba"]
VOCAB, BLOCK = 16, 512
# The known answer of Salmon et al.'s Random123 for philox4x32-10 of counter 0 and key 0.
KNOWN = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
EDGES = (0, 1, 255, 256, 257, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 2**8, 2**32 - 2, 2**32 - 1)


@jit
def words_kernel(words_ptr, noise_ptr, seed_ptr, position_ptr, BLOCK: tl.constexpr):
    # One program makes the words of BLOCK ids at one position, and their noise.
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    words = philox_words(ids, tl.load(position_ptr + row), tl.load(seed_ptr + row))
    tl.store(words_ptr + row * BLOCK + ids, words.to(tl.int64))
    tl.store(noise_ptr + row * BLOCK + ids, -log_of_exponential(words))


@jit
def noise_kernel(noise_ptr, words_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + at, mask=at < count, other=0).to(tl.uint32)
    tl.store(noise_ptr + at, -log_of_exponential(words), mask=at < count)


@jit
def draw_kernel(
    token_ptr, logits_ptr, position_ptr, seed, inverse_temperature, BLOCK: tl.constexpr, VOCAB: tl.constexpr
):
    # One program draws BLOCK tokens from the same logits.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.arange(0, VOCAB)[:, None]
    logits = tl.load(logits_ptr + ids) + tl.zeros([VOCAB, BLOCK], tl.float32)
    position = tl.load(position_ptr + at)[None, :]
    scores = scores_of(logits, ids, position, seed.to(tl.int64), inverse_temperature)
    tl.store(token_ptr + at, tl.argmax(scores, axis=0).to(tl.int64))


def noise_of(backend: str, words: torch.Tensor) -> torch.Tensor:
    """The noise [n] fp32 of words [n] int64."""
    if backend == "torch":
        return -log_of_exponential_torch(words)
    if backend == "numba":
        from runtime.kernels.cpu.gumbel import logs_of_exponentials

        logs = torch.empty(len(words))
        logs_of_exponentials(logs.numpy(), words.numpy().astype("uint32"))
        return -logs
    noise = torch.empty(len(words), device=DEVICE)
    noise_kernel[(cdiv(len(words), BLOCK),)](noise, words.to(DEVICE), len(words), BLOCK=BLOCK)
    return noise.cpu()


def words_of(backend: str, count: int, seed: int, position: int) -> torch.Tensor:
    """The words [count] int64 of the first ids, a multiple of 4."""
    if backend == "torch":
        return philox_torch(count, torch.tensor(seed), torch.tensor(position, dtype=torch.int32))
    if backend == "numba":
        import numpy as np

        from runtime.kernels.cpu.gumbel import philox_words as compiled_words

        words = np.empty((4, count // 4), np.uint32)
        compiled_words(words, 0, np.int64(seed), np.int32(position))
        return torch.from_numpy(words.T.astype(np.int64).ravel().copy())
    words, noise = torch.empty(count, dtype=torch.int64, device=DEVICE), torch.empty(count, device=DEVICE)
    numbers = torch.tensor([seed], device=DEVICE), torch.tensor([position], dtype=torch.int32, device=DEVICE)
    words_kernel[(1,)](words, noise, *numbers, BLOCK=count)
    return words.cpu()


def draws_of(backend: str, logits: torch.Tensor, temperature: float, count: int) -> torch.Tensor:
    """Tokens [count] drawn from logits [VOCAB], at successive positions."""
    position, inverse = torch.arange(count, dtype=torch.int32), torch.tensor(1 / temperature)
    if backend == "torch":
        return scores_torch(logits, torch.tensor(5), position[:, None], inverse).argmax(dim=1)
    if backend == "numba":
        return torch.from_numpy(numba_draws(logits.numpy(), count, inverse.item()))
    token = torch.empty(count, dtype=torch.int64, device=DEVICE)
    draw_kernel[(count // BLOCK,)](
        token, logits.to(DEVICE), position.to(DEVICE), 5, inverse.item(), BLOCK=BLOCK, VOCAB=VOCAB
    )
    return token.cpu()


def numba_draws(logits, count, inverse_temperature):
    import numba
    import numpy as np

    from runtime.kernels.cpu.gumbel import draw, groups_of

    @numba.njit
    def run(tokens, logits, inverse_temperature):
        words, logs = np.empty((4, groups_of(VOCAB)), np.uint32), np.empty((4, groups_of(VOCAB)), np.float32)
        least = np.float32(-np.inf)
        for position in range(len(tokens)):
            _, tokens[position] = draw(
                logits, 0, logits.max(), least, words, logs, 5, position, inverse_temperature, None, 0
            )

    tokens = np.empty(count, np.int64)
    run(tokens, logits, np.float32(inverse_temperature))
    return tokens


def skip_without(backend: str) -> None:
    if backend == "numba" and (missing := cpu_calls.missing(torch.float32)):
        pytest.skip(f"no compiled kernels here: {missing}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_are_philoxs(backend):
    skip_without(backend)
    assert words_of(backend, 4, 0, 0).tolist() == list(KNOWN)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 2), (-1, 2**31 - 1), (-(2**63), 77), (2**63 - 1, 5)])
def test_words_are_the_same_in_every_backend(backend, seed, position):
    skip_without(backend)
    assert torch.equal(words_of(backend, 64, seed, position), words_of("torch", 64, seed, position))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_the_same_in_every_backend_and_near_fp64s(backend):
    skip_without(backend)
    generator = torch.Generator().manual_seed(0)
    words = torch.cat((torch.tensor(EDGES), torch.randint(2**32, (20000,), generator=generator)))
    given = noise_of(backend, words)
    assert torch.equal(given, noise_of("torch", words))
    least = words.clamp(min=2**12)  # the clamp at the lower end is no error of the polynomials
    above = (2**32 - 1 - least).double().add(0.5) / 2**32
    error = (given.double() + torch.log(-torch.log1p(-above))).abs()[words >= 2**12]
    assert error.max() < 3e-6


@pytest.mark.newest_only  # of noise that has the same bits with the oldest
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_have_the_distribution_of_the_softmax(backend, temperature):
    """A chi-square test of 100,000 draws; a wrong temperature or a token left out fails it by far."""
    skip_without(backend)
    count = 196 * BLOCK
    logits = torch.linspace(-2.0, 2.0, VOCAB)[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))]
    drawn = torch.bincount(draws_of(backend, logits, temperature, count), minlength=VOCAB)
    expected = count * (logits.double() / temperature).softmax(dim=0)
    assert stats.chisquare(drawn, expected).pvalue > 1e-3
    wrong = count * (logits.double() / (temperature * 1.05)).softmax(dim=0)
    assert stats.chisquare(drawn, wrong).pvalue < 1e-3


def test_noise_is_uncorrelated_over_positions_seeds_and_ids():
    count = 4096
    base = philox_torch(count, torch.tensor(7), torch.tensor(100)).double()
    neighbours = {
        "the next position": philox_torch(count, torch.tensor(7), torch.tensor(101)),
        "the next seed": philox_torch(count, torch.tensor(8), torch.tensor(100)),
        "a seed of other high bits": philox_torch(count, torch.tensor(7 + 2**32), torch.tensor(100)),
        "seed and position exchanged": philox_torch(count, torch.tensor(100), torch.tensor(7)),
        "the next id": base.roll(1),
        "the next group of ids": base.roll(4),
    }
    for name, other in neighbours.items():
        correlation = torch.corrcoef(torch.stack((base, other.double())))[0, 1].abs()
        assert correlation < 4 / count**0.5, name
        assert not torch.equal(base, other.double()), name

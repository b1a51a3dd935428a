"""Gumbel noise: added to scaled logits, it makes their argmax a sample from their softmax.

    score = logit * inverse_temperature + noise         where inverse_temperature > 0
    score = logit                                       where it is 0: a greedy row
    noise = -log(-log(u))
    u     = (r + 1/2) / 2^32, r = one word of philox4x32-10(counter = (id // 4, position, 0, 0), key = seed)

All in fp32. A token's noise depends on the row's seed, its position and the token's id, and on nothing else, so what a
row draws does not depend on the batch, on the order of arrival or on speculation. Both logarithms are polynomials
evaluated by separate products and sums, never fused, so that every backend computes the same bits; their error is below
3e-6. The inner one is taken of 1 - u in steps of 2^-33, so that even tokens with a probability of 1e-8 are drawn as
often as they should be.

Sources: the Gumbel-max identity (Gumbel, "Statistical theory of extreme values and some practical applications", 1954);
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch

from runtime.kernels.cpu.noise import (
    KEY_STEPS,
    LEAST_WORD,
    LN_2,
    LOG_AROUND_ONE,
    LOG_BELOW_ONE,
    MULTIPLIERS,
    ROUNDS,
    SQRT_HALF_BITS,
)
from runtime.kernels.rotary import product
from runtime.kernels.triton_function import constexpr, jit, tl

MULTIPLIER_0, MULTIPLIER_1 = (constexpr(multiplier) for multiplier in MULTIPLIERS)
KEY_STEP_0, KEY_STEP_1 = (constexpr(step) for step in KEY_STEPS)
_ROUNDS = constexpr(ROUNDS)
_LN_2 = constexpr(LN_2)
_BELOW_ONE = constexpr(LOG_BELOW_ONE)
_AROUND_ONE = constexpr(LOG_AROUND_ONE)
_SQRT_HALF_BITS = constexpr(SQRT_HALF_BITS)
_LEAST_WORD = constexpr(LEAST_WORD)


def scores_torch(
    logits: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    inverse_temperature: torch.Tensor,
    ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scores that one row's argmax is taken over.

    Args:
        logits: [vocab], rounded to the model's dtype.
        seed: [] int64.
        position: [] int32: of the row's last token, from 0. Or [n, 1], for n draws from the same logits.
        inverse_temperature: [] fp32, 1 / temperature; 0 for a greedy row.
        ids: [vocab] int64: the tokens that the logits belong to; None for 0, 1, 2 and so on.

    Returns:
        [vocab] fp32, or [n, vocab].
    """
    wide = logits.float()
    words = philox_torch(len(wide), seed, position) if ids is None else philox_of_ids_torch(ids, seed, position)
    drawn = wide * inverse_temperature - log_of_exponential_torch(words)
    return torch.where(inverse_temperature > 0, drawn, wide)


def philox_torch(count: int, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The words [..., count] int64, from 0 to 2^32 - 1, of ids 0 to count - 1 at positions [...] or [..., 1]."""
    groups = torch.arange((count + 3) // 4, device=seed.device)
    return _philox_of_groups(groups, seed, position).flatten(-2)[..., :count]


def philox_of_ids_torch(ids: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The same for any ids [count] int64."""
    return _philox_of_groups(ids >> 2, seed, position)[..., torch.arange(len(ids), device=ids.device), ids & 3]


def _philox_of_groups(groups: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The words [..., count, 4] of the ids 4 * group to 4 * group + 3, for groups [count]."""
    mask = 0xFFFFFFFF
    c1 = position + torch.zeros_like(groups)
    c0, c2 = groups.expand_as(c1), torch.zeros_like(c1)
    c3 = c2
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(ROUNDS):
        wide0, wide1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # modulo 2^64, whose highest bit is the sign here
        c0, c1 = wide1 >> 32 & mask ^ c1 ^ k0, wide1 & mask
        c2, c3 = wide0 >> 32 & mask ^ c3 ^ k1, wide0 & mask
        k0, k1 = k0 + KEY_STEPS[0] & mask, k1 + KEY_STEPS[1] & mask
    return torch.stack((c0, c1, c2, c3), dim=-1)


def log_of_exponential_torch(words: torch.Tensor) -> torch.Tensor:
    """log(-log(u)) in fp32 of uniform words [...] int64: the negated noise."""
    words = words.clamp(min=LEAST_WORD)
    # u = 2^-halvings * (1 - v), v at most 1/2.
    halvings = 23 - (((words >> 8).float().view(torch.int32) >> 23) - 127)
    v = (0xFFFFFFFF - (words << halvings)).float() * 2.0**-32 + 2.0**-33
    exponential = halvings.float() * LN_2 + v * _polynomial_torch(v, LOG_BELOW_ONE)
    bits = exponential.view(torch.int32)
    power = bits - SQRT_HALF_BITS >> 23
    f = (bits - (power << 23)).view(torch.float32) - 1.0
    return power.float() * LN_2 + f * _polynomial_torch(f, LOG_AROUND_ONE)


def _polynomial_torch(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


@jit
def polynomial(x, COEFFICIENTS: tl.constexpr):
    """sum of COEFFICIENTS[i] * x^i, i from 0 to 7, each product and each sum rounded on its own."""
    value = tl.zeros_like(x) + COEFFICIENTS[7]
    for i in tl.static_range(1, 8):
        value = product(value, x) + COEFFICIENTS[7 - i]
    return value


@jit
def philox_words(ids, position, seed):
    """The words uint32 of ids int32, for positions int32 and seeds int64 that ids broadcast with."""
    c0 = (ids >> 2).to(tl.uint32) + tl.zeros_like(position).to(tl.uint32)
    c1 = tl.zeros_like(c0) + position.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        wide0 = c0.to(tl.uint64) * MULTIPLIER_0
        wide1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0 = (wide1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (wide0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = wide1.to(tl.uint32)
        c3 = wide0.to(tl.uint32)
        k0 += KEY_STEP_0
        k1 += KEY_STEP_1
    lane = ids & 3
    return tl.where(lane < 2, tl.where(lane == 0, c0, c1), tl.where(lane == 2, c2, c3))


@jit
def log_of_exponential(words):
    """log(-log(u)) in fp32 of uniform words uint32."""
    words = tl.maximum(words, _LEAST_WORD)
    high = (words >> 8).to(tl.int32).to(tl.float32)
    halvings = 23 - ((high.to(tl.int32, bitcast=True) >> 23) - 127)
    below = 0x7FFFFFFF - ((words << halvings.to(tl.uint32)) & 0x7FFFFFFF).to(tl.int32)
    v = below.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # exact: 2^-32 and 2^-33
    exponential = product(halvings.to(tl.float32), _LN_2) + product(v, polynomial(v, _BELOW_ONE))
    bits = exponential.to(tl.int32, bitcast=True)
    power = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0
    return product(power.to(tl.float32), _LN_2) + product(f, polynomial(f, _AROUND_ONE))


@jit
def scores_of(logits, ids, position, seed, inverse_temperature):
    """The scores that the argmax is taken over, in fp32, for logits fp32 and ids int32; positions int32, seeds int64
    and inverse temperatures fp32 broadcast with them."""
    drawn = product(logits, inverse_temperature + tl.zeros_like(logits)) - log_of_exponential(
        philox_words(ids, position, seed)
    )
    return tl.where(inverse_temperature > 0.0, drawn, logits)

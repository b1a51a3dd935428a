"""The CPU form of the noise that makes an argmax a sample (kernels/gumbel.py)."""

import numpy as np
from numba import njit

from runtime.kernels.cpu.cache import compiled
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

# Frozen in the compiled code, as fp32 and uint32.
_LN_2 = np.float32(LN_2)
_BELOW_ONE = tuple(np.float32(coefficient) for coefficient in reversed(LOG_BELOW_ONE))
_AROUND_ONE = tuple(np.float32(coefficient) for coefficient in reversed(LOG_AROUND_ONE))
_MULTIPLIER_0, _MULTIPLIER_1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
_KEY_STEP_0, _KEY_STEP_1 = (np.uint32(step) for step in KEY_STEPS)
_HALF = np.uint64(32)
ERROR = np.float32(1e-6)  # of all words none is out of order by more than 1.2e-7
VECTOR = 16  # groups, of four words each, in the widest vectors there are
_SQRT_HALF_BITS, _LEAST_WORD = np.int32(SQRT_HALF_BITS), np.uint32(LEAST_WORD)


@njit(inline="always")
def polynomial(x, c):
    """c[0] * x^7 + ... + c[7], each product and each sum rounded on its own."""
    value = c[0] * x + c[1]
    value = value * x + c[2]
    value = value * x + c[3]
    value = value * x + c[4]
    value = value * x + c[5]
    value = value * x + c[6]
    return value * x + c[7]


@njit(inline="always")
def log_of_exponential(word):
    """log(-log(u)) in fp32 of a uniform word uint32."""
    word = max(word, _LEAST_WORD)
    high = np.float32(np.int32(word >> np.uint32(8)))
    halvings = np.int32(150) - np.int32(np.int32(high.view(np.int32)) >> np.int32(23))
    below = np.int32(0x7FFFFFFF) - np.int32(np.uint32(word << np.uint32(halvings)) & np.uint32(0x7FFFFFFF))
    v = np.float32(below) * np.float32(2.0**-32) + np.float32(2.0**-33)
    exponential = np.float32(halvings) * _LN_2 + v * polynomial(v, _BELOW_ONE)
    bits = np.int32(np.float32(exponential).view(np.int32))
    power = np.int32(np.int32(bits - _SQRT_HALF_BITS) >> np.int32(23))
    f = np.int32(bits - np.int32(power << np.int32(23))).view(np.float32) - np.float32(1.0)
    return np.float32(power) * _LN_2 + f * polynomial(f, _AROUND_ONE)


@compiled
def philox_words(words, first, seed, position):
    """words[w, g] = the word of id 4 * (first + g) + w, for words [4, groups] uint32."""
    seed_0, seed_1 = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)
    for group in range(words.shape[1]):
        c0, c1, c2, c3 = np.uint32(first + group), np.uint32(position), np.uint32(0), np.uint32(0)
        key_0, key_1 = seed_0, seed_1
        for _ in range(ROUNDS):
            wide_0, wide_1 = np.uint64(c0) * _MULTIPLIER_0, np.uint64(c2) * _MULTIPLIER_1
            c0, c1 = np.uint32(np.uint32(wide_1 >> _HALF) ^ c1 ^ key_0), np.uint32(wide_1)
            c2, c3 = np.uint32(np.uint32(wide_0 >> _HALF) ^ c3 ^ key_1), np.uint32(wide_0)
            key_0, key_1 = np.uint32(key_0 + _KEY_STEP_0), np.uint32(key_1 + _KEY_STEP_1)
        words[0, group], words[1, group], words[2, group], words[3, group] = c0, c1, c2, c3


@compiled
def logs_of_exponentials(logs, words):
    """The logarithms of all words, [n] each."""
    for at in range(len(logs)):
        logs[at] = log_of_exponential(words[at])


@njit(inline="always")
def groups_of(count):
    """How many groups of four ids `count` successive ones may touch, in whole vectors."""
    return (count // 4 + 2 + VECTOR - 1) // VECTOR * VECTOR


@compiled
def draw(logits, first, highest, least, words, logs, seed, position, inverse_temperature, mask, row):
    """The greatest score of some ids and its id, the lowest on ties; minus infinity where none reaches `least`. A NaN
    is the greatest.

    Args:
        logits: [n] fp32, of the ids `first` to first + n - 1.
        highest: the greatest of these logits; NaN if there is one.
        words, logs: [4, groups_of(n) or more] uint32 and fp32, buffers.
        mask: [rows, words] int32, a bit for each token that may come (kernels/token_mask.py), of which row `row` is
            read; None where all may.
    """
    begin = first // 4
    philox_words(words, begin, seed, position)
    greatest = np.uint32(0)
    for word in words.reshape(-1):
        greatest = max(greatest, word)
    # No score is above this one: noise grows with its word, but for the polynomials' error.
    if highest * inverse_temperature - (log_of_exponential(greatest) - ERROR) < least:
        return np.float32(-np.inf), first
    logs_of_exponentials(logs.reshape(-1), words.reshape(-1))
    best, best_id = np.float32(-np.inf), first
    for place in range(len(logits)):
        at = first + place
        score = logits[place] * inverse_temperature - logs[at % 4, at // 4 - begin]
        is_out = False
        if mask is not None:
            is_out = score < np.inf and mask[row, at >> 5] >> (at & 31) & 1 == 0
        if not is_out and (score > best or score != score):
            best, best_id = score, at
    return best, best_id

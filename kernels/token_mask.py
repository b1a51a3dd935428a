"""A mask of the tokens that a row may pick, one bit for each.

    token `id` may come next if bit id % 32 of mask[row, id // 32] is 1, the lowest bit first

A token that may not come is left out of the argmax, whatever its logit, unless that is a NaN or infinity: such a logit
must still show that values have outgrown the dtype. Bytes moved: a bit for each token of a row.
"""

from __future__ import annotations

import torch

from runtime.kernels.triton_function import jit, tl

BITS = 32  # of a word
ALL_TOKENS = -1  # a word of ones


def words_of(vocab: int) -> int:
    """How many words a row of the mask has."""
    return (vocab + BITS - 1) // BITS


def new_token_mask(rows: int, vocab: int, device: torch.device) -> torch.Tensor:
    """A mask [rows, words_of(vocab)] int32 that allows every token."""
    return torch.full((rows, words_of(vocab)), ALL_TOKENS, dtype=torch.int32, device=device)


def masked_torch(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The scores [vocab] in fp32 that one row's argmax is taken over, -inf for tokens that may not come.

    Args:
        scores: [vocab] fp32.
        mask: [words_of(vocab)] int32.
    """
    ids = torch.arange(len(scores), device=scores.device)
    is_out = mask[ids // BITS] >> (ids % BITS) & 1 == 0
    return scores.masked_fill(is_out & (scores < torch.inf), -torch.inf)


@jit
def may_come(mask_ptr, row, ids, scores, is_there, WORDS: tl.constexpr):
    """Which of the ids where `is_there` take part in the argmax, given fp32 scores, to whose shape row and ids
    broadcast."""
    words = tl.load(mask_ptr + row * WORDS + (ids >> 5), mask=is_there, other=0)
    is_in = ((words >> (ids & 31)) & 1) != 0
    return is_there & (is_in | ~(scores < float("inf")))

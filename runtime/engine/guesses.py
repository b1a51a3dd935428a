"""Checks guesses at an answer's next tokens against the model's own pick after each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from runtime.engine.answer import Answer
from runtime.kernels.argmax import NO_TOKEN


class Checked(NamedTuple):
    """The result of checking guesses at an answer's next tokens.

    Attributes:
        tokens: the answer's next tokens, as plain steps would give them.
        error: raised by the choice of the token after these, if that failed; then there may be no tokens.
    """

    tokens: list[int]
    error: Exception | None = None


def checked(answer: Answer, picked: Sequence[int], logits: torch.Tensor | None, guesses: Sequence[int]) -> Checked:
    """The answer's next tokens: the right guesses and the model's own token after them, up to where the answer ends.

    Args:
        answer: all earlier tokens have been given to it.
        picked: what the head has picked in each row, NO_TOKEN where its logits are not finite: after the answer's last
            token, and after each guess.
        logits: [len(picked), vocab], needed where the answer has a choice of its own.
        guesses: one fewer than `picked`.
    """
    ends, tokens = {NO_TOKEN, *answer.stop_ids}, list[int]()
    for place, token in enumerate(picked):
        if answer.choice:
            assert logits is not None
            try:
                token = answer.choice.choose(token, logits[place])
            except Exception as error:
                return Checked(tokens, error)
        tokens.append(token)
        is_right = place < len(guesses) and token == guesses[place]
        if not is_right or token in ends or (answer.choice and answer.choice.is_over):
            break
    return Checked(tokens)

"""Tokens on their way to the host, from decode steps and from prompts, handed out in the order of their launches."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from runtime.engine.answer import Answer
from runtime.engine.decode import DeviceSteps
from runtime.engine.ranges import marked
from runtime.engine.readback import Readback
from runtime.families.state import DecodeState
from runtime.kernels.argmax import NO_TOKEN
from runtime.model.model import Model


class Launched(NamedTuple):
    """What launched tokens belong to."""

    answers: tuple[Answer, ...]  # by row
    steps: range | None  # the decode step that picks each; None for a prompt's first token


class PendingTokens:
    """The tokens that have been launched and not yet handed out.

    Args:
        device: reads them back.
        ahead: launches of steps that the device is kept ahead of the host.
    """

    def __init__(self, device: DeviceSteps, ahead: int) -> None:
        self._device, self._ahead = device, ahead
        self._launched: deque[Launched] = deque()
        self._readback: Readback | None = None

    def __len__(self) -> int:
        """How many launches are pending."""
        return len(self._launched)

    def request(self, model: Model, state: DecodeState, tokens: Sequence[Any], launched: Launched) -> None:
        """Asks for tokens that have just been launched, as `Readback.request`, on the state of all rows."""
        if self._readback is None:
            most = self._ahead + 1 + state.batch  # launches of steps, and first tokens
            self._readback = self._device.readback(model, state, most)
        self._readback.request(tokens)
        self._launched.append(launched)

    def hand_out_oldest(self) -> None:
        """Waits for the tokens of the oldest launch, and gives them to their answers."""
        assert self._readback is not None
        answers, steps = self._launched[0]
        with marked("readback"):
            read = self._readback.take()
        for at, tokens in enumerate(read):
            for answer, token in zip(answers, tokens, strict=False):  # a step may have more rows than answers
                if not answer.is_over:
                    give(answer, token, None if steps is None else steps[at])
        self._launched.popleft()

    def forget(self) -> None:
        """Drops all of them."""
        self._launched.clear()
        self._readback = None


def give(answer: Answer, token: int, step: int | None) -> None:
    """Gives an answer its next token.

    Args:
        answer: one that is not over.
        token: NO_TOKEN where its logits were not finite, which ends it.
        step: the number of the decode step that has picked it; None for a prompt's first token.
    """
    if clock := answer.call.clock:
        clock.first() if step is None else clock.tick(step)
    if token == NO_TOKEN:
        answer.has_overflowed = True
        answer.finish(None)
        return
    try:
        answer.take(token)
    except Exception as error:
        answer.fail(error)

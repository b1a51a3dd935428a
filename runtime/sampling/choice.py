"""Chooses an answer's tokens where the head's own pick is not enough: from all logits of its row, on each step. Where
only a grammar restricts the answer, the head picks among the tokens of a mask, and only the first token is chosen here.

    scores = logits in fp32, through the grammar's mask and the processors
    token  = argmax(scores)                                             temperature 0
    token  = argmax(scores / temperature + noise) over what the filters keep, with the head's own noise (gumbel.py)

The choice is a function of the row's logits, its ids so far and its own parameters, so it does not depend on other rows
either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from runtime.errors import InvalidArgument
from runtime.kernels.argmax import NO_TOKEN
from runtime.kernels.gumbel import scores_torch
from runtime.model.threads import torch_threads
from runtime.sampling.filters import kept
from runtime.sampling.logprobs import TokenLogprob, logprobs_of
from runtime.sampling.params import SamplingParams
from runtime.sampling.processors import Processor

if TYPE_CHECKING:
    from runtime.sampling.grammar import Grammar


class Choice:
    """Chooses one answer's tokens, one after another.

    Args:
        params: of the request, with a seed where tokens are drawn.
        prompt: its ids.
        processors: as `processors_of` returns them.
        grammar: what the answer has to follow; None for anything.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        processors: Sequence[Processor] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self._params, self._prompt = params, prompt
        self._processors, self._grammar = processors, grammar
        self.rewind()

    def rewind(self) -> None:
        """Starts over from the prompt."""
        self._ids = list(self._prompt)
        self._matcher = self._grammar.matcher() if self._grammar else None
        self.logprobs: list[TokenLogprob] = []  # of the tokens so far, if they are asked for

    @property
    def is_masked_pick(self) -> bool:
        """Whether every choice is the head's own pick among the tokens of a mask."""
        is_plain = not (self._processors or self._params.filters or self._params.logprobs is not None)
        return self._matcher is not None and is_plain

    def write_mask(self, words: np.ndarray) -> None:
        """Write which tokens may come next, into a row of the head's mask: int32 (kernels/token_mask.py)."""
        assert self._matcher is not None
        words[:] = self._matcher.words()

    def take(self, count: int, token: int) -> None:
        """Takes note of token number `count` of the answer, unless it was chosen here: the head's pick by a mask.

        Raises:
            GrammarTooComplex: as `Matcher.accept`.
        """
        if len(self._ids) < len(self._prompt) + count:
            self._accept(token)

    @property
    def is_over(self) -> bool:
        """Whether no text can follow: the grammar has nothing more."""
        return self._matcher is not None and self._matcher.is_over

    def is_over_after(self, count: int) -> bool:
        """Whether no text can follow token number `count` of the answer, whose later tokens may have been chosen
        already."""
        return self.is_over and len(self._ids) == len(self._prompt) + count

    def choose(self, token: int | None, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            token: what the head has picked or drawn by the answer's parameters from the same logits, NO_TOKEN where
                they are not finite; None if it has picked none.
            logits: [vocab] in the model's dtype.

        Returns:
            The token, NO_TOKEN where the logits are not finite.

        Raises:
            ValueError: nothing is left to choose from.
            Exception: as a processor of the caller raises it.
        """
        if token == NO_TOKEN:
            return token
        # Processors of the caller get tensors that they may keep and use in any way.
        with torch.inference_mode(False), torch.no_grad(), torch_threads(1):
            if token is None or not self._holds(token, logits):
                token = self._pick(logits.to(torch.float32, copy=True))
            if self._params.logprobs is not None:
                self.logprobs += logprobs_of(logits[None], [token], self._params.logprobs)
        self._accept(token)
        return token

    def _accept(self, token: int) -> None:
        self._ids.append(token)
        if self._matcher:
            self._matcher.accept(token)

    def _holds(self, token: int, logits: torch.Tensor) -> bool:
        """Whether the head's token is the choice: it is if nothing changes the logits and the token is among those that
        are left. Its score was the greatest of all, so it is also the greatest of those."""
        if self._processors or (self._matcher and (self._params.filters or not self._matcher.allows(token))):
            return False
        return not self._params.filters or token in left(logits.float(), self._params)

    def _pick(self, scores: torch.Tensor) -> int:
        if self._matcher:
            self._matcher.mask(scores)
        if self._processors:
            ids, batch = torch.tensor([self._ids], device=scores.device), scores[None]
            for processor in self._processors:
                batch = processor(ids, batch)
            scores = batch[0].float()
        greatest = scores.max()
        if not greatest.isfinite():
            raise InvalidArgument(
                f"no token can follow the {len(self._ids)} before it: after everything that the request asks for, the "
                f"greatest logit is {greatest.item()}"
            )
        return draw(scores, self._params, len(self._ids) - 1)


def left(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The ids that the filters leave of scores [vocab] fp32; scores that overflow once scaled all count as the
    greatest."""
    scaled = (scores * params.inverse_temperature).clamp_(max=torch.finfo(torch.float32).max)
    return kept(scaled, params.top_k, params.top_p, params.min_p)


def draw(scores: torch.Tensor, params: SamplingParams, position: int) -> int:
    """The token that is drawn, or picked at temperature 0, after position `position`.

    Args:
        scores: [vocab] fp32, at least one finite and none a NaN.
        params: with a seed where tokens are drawn.
        position: of the last token before it.
    """
    if not params.samples:
        return int(scores.argmax())
    inverse_temperature = torch.tensor(params.inverse_temperature, dtype=torch.float32, device=scores.device)
    ids = None
    if params.filters:
        ids = left(scores, params)
        scores = scores[ids]
    seed = params.seed or 0
    key = torch.tensor(seed - (seed >> 63 << 64), device=scores.device)  # the same 64 bits
    at = torch.tensor(position, dtype=torch.int32, device=scores.device)
    best = scores_torch(scores, key, at, inverse_temperature, ids).argmax()
    return int(best if ids is None else ids[best])

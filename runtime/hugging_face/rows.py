"""One row of a batch of transformers': a request of ours, and what their processors made of its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runtime.engine.engine import Engine
from runtime.engine.stream import Stream
from runtime.model.model import Model

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class RowProcessor:
    """What is done to the logits of one row, and a record of them.

    Args:
        padding: ids in front of the row's own [padding]: transformers' processors see them too.
        processors: what is done to logits before a token is chosen, as transformers' `LogitsProcessorList`.
        warpers: what the choice itself does to them, for the record alone; None for no record.
        prompt_tokens: of the row, without padding.
    """

    def __init__(self, padding: torch.Tensor, processors: Change, warpers: Change | None, prompt_tokens: int) -> None:
        self._padding, self._processors, self._warpers = padding, processors, warpers
        self._prompt_tokens = prompt_tokens
        self.logits: list[torch.Tensor] = []  # [1, vocab] fp32 for each token, if there is a record
        self.scores: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """As our engine calls it: ids [1, seq] without padding, logits [1, vocab] fp32."""
        step, device = ids.shape[1] - self._prompt_tokens, self._padding.device  # transformers' are where the ids are
        ids, theirs = torch.cat([self._padding[None], ids.to(device)], dim=1), logits.to(device)
        processed = self._processors(ids, theirs)
        if self._warpers is not None:
            del self.logits[step:], self.scores[step:]  # what an answer had that has begun anew
            self.logits.append(theirs)
            self.scores.append(self._warpers(ids, processed))
        return processed.to(logits.device)


class Row:
    """A row that is being decoded."""

    def __init__(
        self, model: Model, ids: torch.Tensor, processor: RowProcessor | None, options: dict[str, Any]
    ) -> None:
        self.record = processor
        processors = [] if processor is None else [processor]
        self._stream: Stream = Engine(model).submit(ids.tolist(), logits_processors=processors, **options)

    def next_token(self) -> int:
        """The next token, once it is known.

        Raises:
            Exception: as a processor raises it.
            NonFiniteError: the row's logits were not finite.
        """
        return next(self._stream).token_ids[0]

    def close(self) -> None:
        """End it where it stands."""
        self._stream.close()

"""The rows of a transformers batch: each is a request of ours, with a record of what processors made of its logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from runtime.engine.engine import Engine
from runtime.engine.stream import Stream
from runtime.model.model import Model

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class RowProcessor:
    """The processing of one row's logits, and a record of it.

    Args:
        padding: ids in front of the row's own [padding]: transformers' processors see them too.
        processors: what is done to logits before a token is chosen, as transformers' `LogitsProcessorList`.
        warpers: transformers' form of what our sampling does to logits itself, for the record alone; None for no
            record.
        prompt_tokens: how many the row has, without padding.
    """

    def __init__(self, padding: torch.Tensor, processors: Change, warpers: Change | None, prompt_tokens: int) -> None:
        self._padding, self._processors, self._warpers = padding, processors, warpers
        self._prompt_tokens = prompt_tokens
        self.logits: list[torch.Tensor] = []  # [1, vocab] fp32 for each token, if there is a record
        self.scores: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Called by our engine: ids [1, seq] without padding, logits [1, vocab] fp32."""
        step, device = ids.shape[1] - self._prompt_tokens, self._padding.device  # transformers works where ids are
        ids, theirs = torch.cat([self._padding[None], ids.to(device)], dim=1), logits.to(device)
        processed = self._processors(ids, theirs)
        if self._warpers is not None:
            del self.logits[step:], self.scores[step:]  # what was recorded before the answer began anew
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
        """The next token, once it is known."""
        return next(self._stream).token_ids[0]

    def close(self) -> None:
        """End the row where it stands."""
        self._stream.close()


class Batch:
    """Rows that are read together, token by token. As in transformers, rows that have ended are padded if a token can
    end rows, and otherwise go on with the others.

    Args:
        stops: tokens that end a row; None where none can.
        padding_token: what follows in a row that has ended.
    """

    def __init__(self, stops: Collection[int] | None, padding_token: int) -> None:
        self._stops, self._padding_token = stops, padding_token
        self._rows: list[Row] = []
        self._goes_on: list[bool] = []
        self._is_read: list[bool] = []  # in the last step

    def add(self, row: Row) -> None:
        self._rows.append(row)
        self._goes_on.append(True)

    @property
    def is_over(self) -> bool:
        return not any(self._goes_on)

    def step(self) -> list[int]:
        """The next token of each row.

        Raises:
            Exception: whatever a processor raises.
            NonFiniteError: a row's logits were not finite.
        """
        self._is_read = [goes_on or self._stops is None for goes_on in self._goes_on]
        tokens = [
            row.next_token() if is_read else self._padding_token
            for row, is_read in zip(self._rows, self._is_read, strict=True)
        ]
        self.end([token in (self._stops or ()) for token in tokens])
        return tokens

    def end(self, ended: Sequence[bool]) -> None:
        """Ends some of the rows."""
        for index, is_ended in enumerate(ended):
            self._goes_on[index] &= not is_ended
            if self._stops is not None and not self._goes_on[index]:
                self._rows[index].close()

    def recorded(self, what: Callable[[RowProcessor], list[torch.Tensor]], step: int) -> torch.Tensor:
        """What the processors of all rows recorded in the last step: [batch, vocab], 0 for a row that had ended."""
        found = [
            what(row.record)[step] if is_read and row.record else None
            for row, is_read in zip(self._rows, self._is_read, strict=True)
        ]
        ended = torch.zeros_like(next(one for one in found if one is not None))
        return torch.cat([ended if one is None else one for one in found])

    def close(self) -> None:
        """Ends all rows."""
        for row in self._rows:
            row.close()

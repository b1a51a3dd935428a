"""One row's answer, growing token by token until a stop token, a stop string or its length ends it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from runtime.result import FinishReason, Piece
from runtime.stop_strings import StopStrings
from runtime.tokenizer import Tokenizer


class Answer:
    """The new tokens of one row and the text they make.

    Args:
        index: the row of the batch.
        tokenizer: what turns ids into text; None leaves the text empty.
        max_new_tokens: the length at which the answer ends.
        stop_ids: tokens that end it; the token is kept, its text is not.
        stop_strings: strings that end it; the text is cut before them.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer | None,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None if max_new_tokens else "length"
        self._max_new_tokens = max_new_tokens
        self._stop_ids = stop_ids
        self._stop_strings = StopStrings(stop_strings)
        self._detokenizer = tokenizer.incremental() if tokenizer else None

    def take(self, token: int) -> Piece:
        """Add a token.

        Returns:
            What it adds to the text; with the last token also whatever was held back until then.
        """
        self.token_ids.append(token)
        delta = ""
        if token in self._stop_ids:
            self.finish_reason = "stop"
        elif self._detokenizer:
            delta = self._stop_strings.push(self._detokenizer.push(token))
        if self.finish_reason is None and self._stop_strings.found:
            self.finish_reason = "stop"
        elif self.finish_reason is None and len(self.token_ids) == self._max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason and self._detokenizer:
            # The last bytes may still complete a stop string; if not, nothing is worth holding back any more.
            delta += self._stop_strings.push(self._detokenizer.finish())
            if self._stop_strings.found:
                self.finish_reason = "stop"
            delta += self._stop_strings.finish()
        self.text += delta
        return Piece(delta, (token,), self.index)

"""One row's answer, growing token by token until a stop token, a stop string or its length ends it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from runtime.engine.result import FinishReason, Piece
from runtime.text.stop_strings import StopStrings
from runtime.text.tokenizer import Tokenizer


class Answer:
    """The new tokens of one row and their text.

    Args:
        index: the row of the batch.
        tokenizer: converts ids to text; None leaves the text empty.
        max_new_tokens: the length at which the answer ends.
        stop_ids: tokens that end it; the token is kept, but not its text.
        stop_strings: strings that end it with the token that completes one; the text is cut before them.
        prompt: ids of the prompt, where a stop string may begin.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer | None,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None if max_new_tokens else "length"
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._stop_ids = stop_ids
        self._detokenizer = tokenizer.incremental() if tokenizer else None
        self._stop_strings: StopStrings | None = None
        if tokenizer and stop_strings:
            longest = max(len(string.encode()) for string in stop_strings)
            self._stop_strings = StopStrings(stop_strings, map(tokenizer.bytes_of, prompt[-longest:]))
        # Tokens held back because a stop string may begin in the first of them, with their bytes.
        self._held: deque[tuple[int, bytes]] = deque()

    def take(self, token: int) -> Piece:
        """Add a token.

        Returns:
            What it adds to the text; with the last token also whatever was held back.
        """
        self.token_ids.append(token)
        if token in self._stop_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._max_new_tokens:
            self.finish_reason = "length"
        delta = self._text_of(token)
        self.text += delta
        return Piece(delta, (token,), self.index)

    def _text_of(self, token: int) -> str:
        if self._tokenizer is None or self._detokenizer is None:
            return ""
        begins, pending = None, 0
        token_bytes: bytes | None = b""
        if self._stop_strings:
            token_bytes = self._tokenizer.bytes_of(token)
            begins, pending = self._stop_strings.push(token_bytes), self._stop_strings.pending
        self._held.append((token, token_bytes or b""))
        if begins is not None:
            self.finish_reason = "stop"
            return self._release(begins) + self._detokenizer.finish() + self._beginning(begins)
        text = self._release(0 if self.finish_reason else pending)
        return text + self._detokenizer.finish() if self.finish_reason else text

    def _release(self, keep: int) -> str:
        """The text of the held tokens that end before the last `keep` bytes."""
        assert self._detokenizer
        text, held = "", sum(len(token_bytes) for _, token_bytes in self._held)
        while self._held and held - len(self._held[0][1]) >= keep:
            token, token_bytes = self._held.popleft()
            held -= len(token_bytes)
            if token not in self._stop_ids:
                text += self._detokenizer.push(token)
        return text

    def _beginning(self, keep: int) -> str:
        """The text before a stop string in the token where it begins: all but the last `keep` held bytes."""
        held = sum(len(token_bytes) for _, token_bytes in self._held)
        if held <= keep:
            return ""
        assert self._tokenizer
        token, token_bytes = self._held[0]
        is_shown = token not in self._stop_ids and self._tokenizer.decode([token])
        return token_bytes[: held - keep].decode() if is_shown else ""

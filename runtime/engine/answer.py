"""One prompt's answer, growing token by token until a stop token, a stop string or its length ends it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence

from runtime.engine.clock import Clock
from runtime.engine.result import FinishReason, Piece
from runtime.sampling.choice import Choice
from runtime.sampling.logprobs import TokenLogprob
from runtime.sampling.params import GREEDY, SamplingParams
from runtime.text.stop_strings import StopStrings
from runtime.text.tokenizer import Tokenizer


class Answer:
    """The new tokens of one prompt and their text, and what the engine needs to run it.

    Args:
        index: the prompt's place in its request.
        tokenizer: converts ids to text; None leaves the text empty.
        max_new_tokens: the length at which the answer ends.
        stop_ids: tokens that end it; the token is kept, but its text is left out, unless special tokens are shown.
        stop_strings: strings that end it with the token that completes one; the text is cut before them.
        prompt: ids of the prompt, where a stop string may begin.
        call: what the answers of one request share; None for a new one.
        sampling: how its tokens are chosen, with a seed where they are drawn.
        skip_special_tokens: whether the text leaves out special tokens.
        choice: chooses its tokens from all logits; None to take the head's picks.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer | None,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        prompt: Sequence[int] = (),
        call: Call | None = None,
        sampling: SamplingParams = GREEDY,
        skip_special_tokens: bool = True,
        choice: Choice | None = None,
    ) -> None:
        self.index = index
        self.sampling = sampling
        self.choice = choice
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.stop_ids = stop_ids
        self.call = call or Call()
        self.pieces: list[Piece] = []  # handed out; only ever appended to
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        runs = bool(max_new_tokens) or sampling.prompt_logprobs is not None
        self.finish_reason: FinishReason | None = None if runs else "length"
        self.is_over = not runs  # set last: nothing changes after it
        self.has_overflowed = False  # its logits were not finite
        self.error: Exception | None = None
        self.cached_tokens = 0  # of the prompt, from earlier prompts
        self.steps = 0  # decode steps launched for it
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._skip_special_tokens = skip_special_tokens
        self._hidden_ids = stop_ids if skip_special_tokens else ()  # whose text is left out, besides special tokens
        self.rewind()

    def rewind(self) -> None:
        """Starts over from the prompt. The tokens come out the same, and what has been handed out is not handed out
        again."""
        self.token_ids: list[int] = []
        self.text = ""
        self.steps = 0
        if self.choice:
            self.choice.rewind()
        self._detokenizer = self._tokenizer.incremental(self._skip_special_tokens) if self._tokenizer else None
        self._matcher: StopStrings | None = None
        if self._tokenizer and self._stop_strings:
            longest = max(len(string.encode()) for string in self._stop_strings)
            self._matcher = StopStrings(self._stop_strings, map(self._tokenizer.bytes_of, self.prompt[-longest:]))
        # Tokens held back because a stop string may begin in the first of them, with their bytes.
        self._held: deque[tuple[int, bytes]] = deque()

    def take(self, token: int) -> Piece:
        """Add a token.

        Returns:
            What it adds to the text; with the last token also whatever was held back.
        """
        if self.choice:
            self.choice.take(len(self.token_ids) + 1, token)
        self.token_ids.append(token)
        reason: FinishReason | None = None
        if token in self.stop_ids or (self.choice and self.choice.is_over_after(len(self.token_ids))):
            reason = "stop"
        elif len(self.token_ids) == self.max_new_tokens:
            reason = "length"
        delta, found = self._text_of(token, is_last=reason is not None)
        self.text += delta
        logprobs = self.choice.logprobs if self.choice else ()
        piece = Piece(delta, (token,), self.index, logprobs[len(self.token_ids) - 1] if logprobs else None)
        if len(self.token_ids) > len(self.pieces):
            self.pieces.append(piece)
            self.call.arrived.append(self)
        if found or reason:
            self.finish("stop" if found else reason)
        self.call.wake()
        return piece

    def finish(self, reason: FinishReason | None) -> None:
        """Ends the answer where it stands."""
        self.finish_reason = reason
        self.is_over = True
        self.call.wake()

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error, which its reader gets."""
        self.error = error
        self.finish(None)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Those of the tokens handed out so far; None unless asked for."""
        if self.sampling.logprobs is None:
            return None
        return tuple(piece.logprob for piece in self.pieces if piece.logprob is not None)

    def _text_of(self, token: int, *, is_last: bool) -> tuple[str, bool]:
        """What a token adds to the text, and whether it completes a stop string."""
        if self._tokenizer is None or self._detokenizer is None:
            return "", False
        if self._matcher is None:
            text = "" if token in self._hidden_ids else self._detokenizer.push(token)
            return text + self._detokenizer.finish() if is_last else text, False
        token_bytes = self._tokenizer.bytes_of(token)
        begins, pending = self._matcher.push(token_bytes), self._matcher.pending
        self._held.append((token, token_bytes or b""))
        if begins is not None:
            return self._release(begins) + self._detokenizer.finish() + self._beginning(begins), True
        text = self._release(0 if is_last else pending)
        return text + self._detokenizer.finish() if is_last else text, False

    def _release(self, keep: int) -> str:
        """The text of the held tokens that end before the last `keep` bytes."""
        assert self._detokenizer
        text, held = "", sum(len(token_bytes) for _, token_bytes in self._held)
        while self._held and held - len(self._held[0][1]) >= keep:
            token, token_bytes = self._held.popleft()
            held -= len(token_bytes)
            if token not in self._hidden_ids:
                text += self._detokenizer.push(token)
        return text

    def _beginning(self, keep: int) -> str:
        """The text before a stop string in the token where it begins: all but the last `keep` held bytes."""
        held = sum(len(token_bytes) for _, token_bytes in self._held)
        if held <= keep:
            return ""
        assert self._tokenizer
        token, token_bytes = self._held[0]
        is_shown = token not in self._hidden_ids and self._tokenizer.decode([token], self._skip_special_tokens)
        return token_bytes[: held - keep].decode() if is_shown else ""


class Call:
    """What the answers of one request share: how they are ended early, and how their reader learns of new pieces.

    Args:
        timeout: seconds from now after which they are cancelled; None for no limit.
        cancel: cancels them once it is set.
        reuses: whether prompts use the prefix cache: reuse what earlier ones left in it, and leave their own.
        clock: times the request; None where nobody reads the times.
        speculates: whether they are decoded with speculation.
    """

    def __init__(
        self,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        reuses: bool = True,
        clock: Clock | None = None,
        speculates: bool = False,
    ) -> None:
        self.clock = clock
        self.speculates = speculates
        self.reuses = reuses
        self.arrived: deque[Answer] = deque()  # an answer for each piece, in the order of arrival
        self.ready = threading.Event()  # set with each piece and each end
        self.is_ended = False  # by its reader: whatever is unfinished ends in the next step
        self.reason: FinishReason | None = None  # what it then ends with
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._cancel = cancel

    @property
    def is_watched(self) -> bool:
        """Whether something outside the engine may end it."""
        return self._deadline is not None or self._cancel is not None

    def wake(self) -> None:
        """Tells the reader that there is something new."""
        if not self.ready.is_set():
            self.ready.set()

    def end(self, reason: FinishReason | None) -> None:
        """Asks for the end of whatever is unfinished."""
        if not self.is_ended:
            self.reason, self.is_ended = reason, True

    def look(self) -> None:
        """Ends it if its time is up or its event has been set."""
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        if is_late or (self._cancel is not None and self._cancel.is_set()):
            self.end("cancelled")

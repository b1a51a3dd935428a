"""Grammars that answers follow: which tokens of a model's own vocabulary may come next.

    grammars = Grammars(tokenizer, config.stop_token_ids)  # one for a model
    matcher = grammars.compile(read_response_format(MyClass)).matcher()  # one for an answer
    while not matcher.is_over:
        matcher.mask(logits)  # fp32 [vocab]: -inf where a token may not come next
        matcher.accept(int(logits.argmax()))

A token may come next if some text of the grammar begins with the answer and that token: masks are exact. Stop tokens
may come where the answer is a complete text of the grammar, special tokens nowhere.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from runtime.errors import GrammarTooComplex, InvalidArgument
from runtime.kernels.token_mask import words_of
from runtime.sampling.library import allowed_bits, error_of, first_matcher, library
from runtime.sampling.response_format import ResponseFormat
from runtime.text.tokenizer import Tokenizer

_UTF8 = {bytes([byte]) for byte in range(0xF5) if byte not in (0xC0, 0xC1)}  # the bytes that text can have

# For each byte of a mask, what the logits of its eight tokens may be at most.
_CEILINGS = torch.from_numpy(
    np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.float32(np.inf), -np.float32(np.inf))
)


class Grammars:
    """The grammars of one model, each compiled on first use and kept. Any number of threads may share it.

    Making one takes no time; the first grammar takes about a second with 262,144 tokens, others a few milliseconds.

    Args:
        tokenizer: the model's.
        stop_token_ids: the tokens that end an answer; without any it ends where the grammar cannot go on.
        keep: how many grammars are kept, the most recently used ones.
    """

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Sequence[int], keep: int = 64) -> None:
        self._tokenizer, self._keep = tokenizer, keep
        self._stop_token_ids = tuple(token for token in stop_token_ids if token < tokenizer.vocab_size)
        self._vocabulary: Any = None  # the library's tokenizer, once it is needed
        self._compiled: OrderedDict[ResponseFormat, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, response_format: ResponseFormat) -> Grammar:
        """The grammar of a format.

        Raises:
            InvalidArgument: the model's vocabulary cannot spell every text.
            GrammarTooComplex: the grammar is beyond the library's limits with this vocabulary.
        """
        with self._lock:
            if response_format not in self._compiled:
                if self._vocabulary is None:
                    self._vocabulary = _vocabulary(self._tokenizer, self._stop_token_ids)
                self._compiled[response_format] = Grammar(
                    self._vocabulary, response_format, self._tokenizer.vocab_size, self._stop_token_ids
                )
                if len(self._compiled) > self._keep:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(response_format)
            return self._compiled[response_format]


class Grammar:
    """A grammar compiled for one vocabulary. It never changes, and any number of threads may share it.

    Args:
        vocabulary: the library's tokenizer, whose last token is the end of the text.
        response_format: which texts it allows.
        vocab: size of the model's vocabulary.
        stop_token_ids: the tokens that end an answer.
    """

    def __init__(
        self, vocabulary: Any, response_format: ResponseFormat, vocab: int, stop_token_ids: tuple[int, ...]
    ) -> None:
        self.vocab, self.stop_token_ids = vocab, stop_token_ids
        self._first = first_matcher(vocabulary, response_format.lark, "response_format", has_places=False)
        self.matcher()  # fails here if it fails at once

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        return Matcher(self, self._first.deep_copy())


class Matcher:
    """One answer's position in a grammar, for one thread at a time. `Grammar.matcher` makes it.

    Attributes:
        may_stop: whether the answer so far is a complete text of the grammar.
        is_over: whether no token of text may come next: after a stop token, or where the grammar has nothing more.
    """

    may_stop: bool
    is_over: bool

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self._text: np.ndarray  # which tokens of text may come next, a bit for each
        self._grammar, self._matcher = grammar, matcher
        self._look_ahead()

    def mask(self, logits: torch.Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf; NaNs stay.

        At least one token is left, except after a stop token, or where an answer is over and the model has no stop
        tokens.

        Args:
            logits: fp32 [vocab] on any device, changed in place.
        """
        assert logits.shape == (self._grammar.vocab,), logits.shape
        indices = torch.from_numpy(self._bits()).to(logits.device).int()
        ceiling = _CEILINGS.to(logits.device).index_select(0, indices).view(-1)[: self._grammar.vocab]
        torch.minimum(logits, ceiling, out=logits)

    def words(self) -> np.ndarray:
        """Which tokens may come next, as the head's mask has them (kernels/token_mask.py): int32 [words]."""
        words: np.ndarray = self._bits().view("<i4")[: words_of(self._grammar.vocab)]
        return words

    def _bits(self) -> np.ndarray:
        """The same with a byte for eight tokens, stop tokens included."""
        bits = self._text
        if self.may_stop:
            bits = bits.copy()
            for token in self._grammar.stop_token_ids:
                bits[token >> 3] |= 1 << (token & 7)
        return bits

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if token in self._grammar.stop_token_ids:
            return self.may_stop
        return 0 <= token < self._grammar.vocab and bool(self._text[token >> 3] >> (token & 7) & 1)

    def accept(self, token: int) -> None:
        """Take the answer's next token.

        Raises:
            InvalidArgument: the token may not come next; nothing has changed.
            GrammarTooComplex: what follows is beyond the library's limits. The answer cannot go on.
        """
        if not self.allows(token):
            raise InvalidArgument(f"token must be one that the grammar allows here, got {token}")
        if token in self._grammar.stop_token_ids:
            self._text, self.may_stop, self.is_over = np.zeros_like(self._text), False, True
            return
        self._matcher.consume_token(token)
        self._look_ahead()

    def _look_ahead(self) -> None:
        end = self._grammar.vocab  # the library's token
        self._text = allowed_bits(self._matcher, end + 1)
        self.may_stop = bool(self._text[end >> 3] >> (end & 7) & 1)
        self._text[end >> 3] &= ~(1 << (end & 7)) & 0xFF
        self.is_over = not self._text.any()
        if reason := error_of(self._matcher):
            raise GrammarTooComplex(
                f"response_format must be simpler, the answer has come to a place beyond llguidance's limits: {reason}"
            )


def _vocabulary(tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> Any:
    """The library's tokenizer: the bytes of each of the model's tokens, none of special and stop tokens, and one more
    token for the end of the text."""
    silent = {*tokenizer.special_ids, *stop_token_ids}
    tokens = [b"" if token in silent else tokenizer.bytes_of(token) or b"" for token in range(tokenizer.vocab_size)]
    if missing := sorted(_UTF8.difference(tokens)):
        # With a token for every byte, every beginning of a text has a next token, so no answer reaches a dead end.
        raise InvalidArgument(
            f"structured output needs a tokenizer with a token for every byte, got one without {len(missing)} of them, "
            f"among them {missing[0]!r}"
        )
    return library().LLTokenizer(_Tokens(tokens))


class _Tokens:
    """A vocabulary as the library takes it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = [*tokens, b"<end>"]
        self.eos_token_id = len(tokens)
        self.special_token_ids = [len(tokens)]

    def __call__(self, text: bytes) -> list[int]:
        """Called only to force text that a grammar leaves no choice in, which is switched off (library.py)."""
        raise NotImplementedError

"""Text to ids and back: encode, decode, chat template, and decoding one id at a time.

Built on the `tokenizers` library, as Hugging Face's own tokenizer is; tokenizer_files.py says what it is built of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from runtime.errors import CheckpointError, InvalidArgument, InvalidArgumentType
from runtime.text.tokenizer_files import GEMMA_DECODER, read_tokenizer, state_of

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BEFORE = "abcdef"


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: the tokenizer of the `tokenizers` library.
        vocab: size of the model's vocabulary; ids from there on are refused.
        named: the special tokens by their names ("bos_token", ...), as a chat template knows them.
        chat_template: Jinja source, or None for a model without one.

    Raises:
        CheckpointError: the tokenizer's vocabulary is larger than the model's.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        vocab: int,
        named: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        # Tokens added beyond the model's vocabulary are tolerated until used: Gemma 3's text-only checkpoints share
        # their tokenizer with the multimodal ones and so have an image token that the embedding table lacks.
        size = backend.get_vocab_size(with_added_tokens=False)
        if size > vocab:
            raise CheckpointError(f"the tokenizer has {size} tokens, but the model's vocabulary ends at {vocab}")
        # transformers cuts and pads a text only where its caller says so, whatever the file says.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._vocab = vocab
        self._named = dict(named or {})
        self._chat_template = chat_template
        decoder = state_of(backend.decoder)
        self._decodes_in_place = decoder == GEMMA_DECODER
        self._decoders = {part.get("type") for part in (decoder or {}).get("decoders", [decoder or {}])}

    @classmethod
    def from_folder(cls, folder: Path, vocab: int) -> Tokenizer | None:
        """Read the tokenizer of a checkpoint folder.

        Args:
            folder: holds tokenizer.json and what transformers reads beside it.
            vocab: size of the model's vocabulary.

        Returns:
            The tokenizer, or None where the folder has none: such a model works with ids only.

        Raises:
            CheckpointError: the files cannot be read, or disagree with the model's vocabulary.
        """
        files = read_tokenizer(folder)
        return None if files is None else cls(files.backend, vocab, files.named, files.chat_template)

    @property
    def bos_id(self) -> int:
        """The id of the BOS token.

        Raises:
            InvalidArgument: there is none in the model's vocabulary.
        """
        name = self._named.get("bos_token")
        token = None if name is None else self._backend.token_to_id(name)
        if token is None or token >= self._vocab:
            raise InvalidArgument(
                f"the tokenizer's BOS token, {name!r}, is not in the vocabulary of {self._vocab} tokens"
            )
        return token

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary: every id is below it."""
        return self._vocab

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a text as transformers' tokenizer gives them, with whatever special tokens it adds (Gemma's: BOS).

        Raises:
            TypeError: `text` is not a string.
            ValueError: it holds a token that the model's vocabulary lacks, or cannot be encoded as UTF-8.
        """
        return self._encode(text, add_special_tokens=True)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def piece(self, token: int) -> str:
        """One token as shown in a listing: its text with spaces as spaces; a byte token as "<0x0A>"."""
        piece = self._backend.id_to_token(token)
        return f"<{token}>" if piece is None else piece.replace("▁", " ")

    def bytes_of(self, token: int) -> bytes | None:
        """What a token spells wherever it stands in a text, special tokens included; None for an id without a token.

        Raises:
            InvalidArgument: what this tokenizer's tokens spell depends on where they stand.
        """
        piece = self._backend.id_to_token(token)
        if piece is None:
            return None
        if "ByteFallback" in self._decoders and _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        if self._decodes_in_place:
            return piece.replace("▁", " ").encode()
        # Behind other tokens, since some decoders treat the first one of a text unlike the rest.
        pieces = [*self._backend.encode(_BEFORE, add_special_tokens=False).tokens, piece]
        text = " ".join(pieces) if self._backend.decoder is None else self._backend.decoder.decode(pieces)
        if "ByteLevel" in self._decoders or _BEFORE not in text:
            raise InvalidArgument(
                "this model's tokenizer does not spell out its tokens: it cannot look for stop strings"
            )
        return text[text.index(_BEFORE) + len(_BEFORE) :].encode()

    def apply_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation under the checkpoint's chat template, ready for the model's turn.

        They are those of transformers' `apply_chat_template(messages, add_generation_prompt=True)`: the template writes
        its own BOS, and nothing is added.

        Args:
            messages: at least one, each with a "role" ("user", "assistant", where the template knows it "system") and a
                "content": text or a list of parts of type "text"; what else a message may hold is the template's.

        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
            TypeError: a message is not a mapping.
        """
        if self._chat_template is None:
            raise InvalidArgument("this model has no chat template (is it a base model?)")
        from runtime.text.chat_template import render

        return self._encode(render(self._chat_template, messages, self._named), add_special_tokens=False)

    @property
    def decodes_in_place(self) -> bool:
        """Whether a token's text is the same wherever it stands, runs of bytes apart."""
        return self._decodes_in_place

    def incremental(self) -> IncrementalDecoder:
        """A decoder that takes ids one at a time."""
        return IncrementalDecoder(self)

    def is_byte(self, token: int) -> bool:
        """Whether a token stands for a single byte, which may be part of a character."""
        piece = self._backend.id_to_token(token)
        return piece is not None and _BYTE_TOKEN.fullmatch(piece) is not None

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise InvalidArgumentType(f"text must be a string, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"text must be valid Unicode, got a lone surrogate at {error.start}") from None
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        for token in ids:
            if token >= self._vocab:
                piece = self._backend.id_to_token(token)
                raise InvalidArgument(f"token {piece!r} ({token}) is past the model's vocabulary of {self._vocab}")
        return ids


class IncrementalDecoder:
    """Decodes a stream of ids into text deltas that concatenate to the decoding of all ids at once.

    A run of byte tokens is held until a token of another kind ends it: the decoder judges a run as a whole, and one
    bad byte turns all of its characters into U+FFFD. Decoders other than Gemma's may change any text until the end.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take the next id; return the text that is certain now, "" while a character is incomplete."""
        if not self._tokenizer.decodes_in_place:
            self._pending.append(token)
            return ""
        text = self._tokenizer.decode([token])
        if not text:  # special tokens are skipped in decoding, so they do not end a run either
            return ""
        is_byte = self._tokenizer.is_byte(token)
        if not is_byte and not self._pending:
            return text
        self._pending.append(token)
        return "" if is_byte else self.finish()

    def finish(self) -> str:
        """Return what is still held, at the end of the stream."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text

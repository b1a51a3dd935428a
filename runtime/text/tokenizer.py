"""Text to ids and back: encode, decode, chat template, incremental decoding.

Like Hugging Face's tokenizer, it runs on the `tokenizers` library; tokenizer_files.py reads its files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from runtime.checkpoint import gemma_tokenizer
from runtime.errors import CheckpointError, InvalidArgument, InvalidArgumentType
from runtime.text.plain_tokenizer import state_of
from runtime.text.tokenizer_files import read_tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BEFORE = "abcdef"  # text to decode a token after
LONG_TEXT = 10_000  # characters, whose encoding takes some hundredths of a second


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: the tokenizer of the `tokenizers` library.
        vocab: size of the model's vocabulary; larger ids are refused.
        named: the special tokens by the names that chat templates use ("bos_token", ...).
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
        # Added tokens beyond the model's vocabulary are tolerated until used: Gemma 3's text-only checkpoints share the
        # multimodal ones' tokenizer, which has an image token that the embedding table lacks.
        size = backend.get_vocab_size(with_added_tokens=False)
        if size > vocab:
            raise CheckpointError(f"the tokenizer has {size} tokens, but the model's vocabulary ends at {vocab}")
        # transformers truncates and pads only if its caller asks for it, whatever the file says.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._vocab = vocab
        self._named = dict(named or {})
        self._chat_template = chat_template
        decoder = state_of(backend.decoder)
        # Whether a token's text is independent of its context, byte tokens apart.
        self.decodes_in_place = decoder == gemma_tokenizer.DECODER
        self._texts: dict[tuple[int, bool], tuple[str, bool]] = {}
        self._decoders = {stage.get("type") for stage in (decoder or {}).get("decoders", [decoder or {}])}

    @classmethod
    def from_folder(cls, folder: Path, vocab: int) -> Tokenizer | None:
        """Read the tokenizer of a checkpoint folder.

        Args:
            folder: holds tokenizer.json and what transformers reads beside it.
            vocab: size of the model's vocabulary.

        Returns:
            The tokenizer, or None if the folder has none: such a model takes and gives only ids.

        Raises:
            CheckpointError: the files cannot be read, or disagree with the model's vocabulary.
        """
        files = read_tokenizer(folder)
        return None if files is None else cls(files.backend, vocab, files.named, files.chat_template)

    @property
    def bos_id(self) -> int:
        """The id of the BOS token.

        Raises:
            InvalidArgument: the model's vocabulary has none.
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
    def special_ids(self) -> frozenset[int]:
        """The special tokens, which `decode` skips."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special and token < self._vocab)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, equal to transformers', with the special tokens that its tokenizer adds (Gemma's: BOS) unless
        `add_special_tokens` is False.

        Raises:
            TypeError: `text` is not a string.
            ValueError: it contains a token beyond the model's vocabulary, or is not valid Unicode.
        """
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids, as transformers' `decode` gives it. Bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def piece(self, token: int) -> str:
        """One token for display: its text, with spaces as spaces; a byte token as "<0x0A>"."""
        piece = self._backend.id_to_token(token)
        return f"<{token}>" if piece is None else piece.replace("▁", " ")

    def bytes_of(self, token: int) -> bytes | None:
        """A token's bytes anywhere in a text, for special tokens too; None for an id without a token.

        Raises:
            InvalidArgument: the bytes of this tokenizer's tokens depend on their context.
        """
        piece = self._backend.id_to_token(token)
        if piece is None:
            return None
        if "ByteFallback" in self._decoders and _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        if self.decodes_in_place:
            return piece.replace("▁", " ").encode()
        # After other tokens, since some decoders treat the first token differently.
        pieces = [*self._backend.encode(_BEFORE, add_special_tokens=False).tokens, piece]
        text = " ".join(pieces) if self._backend.decoder is None else self._backend.decoder.decode(pieces)
        if "ByteLevel" in self._decoders or _BEFORE not in text:
            raise InvalidArgument(
                "this model's tokenizer gives its tokens no bytes of their own, which stop strings and grammars need"
            )
        return text[text.index(_BEFORE) + len(_BEFORE) :].encode()

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        if self._chat_template is None:
            return False
        from runtime.text.chat_template import takes_tools

        return takes_tools(self._chat_template)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        begins_turn: bool = True,
    ) -> str:
        """The text of a conversation under the checkpoint's chat template, as transformers'
        `apply_chat_template(messages, tools=tools, add_generation_prompt=begins_turn, tokenize=False)`.

        Raises:
            as `apply_chat`.
        """
        if self._chat_template is None:
            raise InvalidArgument("this model has no chat template (is it a base model?)")
        from runtime.text.chat_template import render

        return render(self._chat_template, messages, self._named, tools, begins_turn)

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Ids of a conversation under the checkpoint's chat template, ready for the model's turn.

        Equal to transformers' `apply_chat_template(messages, add_generation_prompt=True)`: the template writes the BOS,
        and nothing is added.

        Args:
            messages: at least one, each with a "role" ("user", "assistant", in some templates "system") and a
                "content": text or a list of items of type "text". Other fields are up to the template.
            tools: what the model may call, each as OpenAI's API and transformers describe one; None for nothing.

        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
            TypeError: a message is not a mapping.
        """
        return self._encode(self.render_chat(messages, tools), add_special_tokens=False)

    def incremental(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder that takes one id at a time."""
        return IncrementalDecoder(self, skip_special_tokens)

    def text_of(self, token: int, skip_special_tokens: bool = True) -> tuple[str, bool]:
        """What `decode` makes of one token, and whether that is a single byte, perhaps of a longer character.

        Cached, since a model's next step waits for it.
        """
        key = token, skip_special_tokens
        if key not in self._texts:
            piece = self._backend.id_to_token(token)
            is_byte = piece is not None and _BYTE_TOKEN.fullmatch(piece) is not None
            self._texts[key] = self.decode([token], skip_special_tokens), is_byte
        return self._texts[key]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise InvalidArgumentType(f"text must be a string, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"text must be valid Unicode, got a lone surrogate at {error.start}") from None
        if len(text) < LONG_TEXT:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        else:  # `encode` holds the GIL, which stops all other threads of the process; batches do not
            ids = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        for token in ids:
            if token >= self._vocab:
                piece = self._backend.id_to_token(token)
                raise InvalidArgument(f"token {piece!r} ({token}) is beyond the model's vocabulary of {self._vocab}")
        return ids


class IncrementalDecoder:
    """Decodes ids one at a time into text deltas, which concatenate to the text of all ids.

    Consecutive byte tokens are held back until another token follows: they are decoded together, and one invalid byte
    turns all their characters into U+FFFD. A special token between them ends the run only if the text includes it.
    Decoders other than Gemma's may change any text until the end.

    Args:
        tokenizer: the tokenizer.
        skip_special_tokens: whether the text leaves out special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take the next id; return the text that is now final, "" while a character is incomplete."""
        if not self._tokenizer.decodes_in_place:
            self._pending.append(token)
            return ""
        text, is_byte = self._tokenizer.text_of(token, self._skip_special_tokens)
        if not text:  # skipped special tokens do not end a run of bytes
            return ""
        if not is_byte and not self._pending:
            return text
        self._pending.append(token)
        return "" if is_byte else self.finish()

    def finish(self) -> str:
        """Return the text still held back, at the end of the answer."""
        text = self._tokenizer.decode(self._pending, self._skip_special_tokens)
        self._pending.clear()
        return text

"""Text to ids and back: encode, decode, chat template, and decoding one id at a time.

Built on the `tokenizers` library and the checkpoint's tokenizer.json, as Hugging Face's own tokenizer is, but without
importing transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from runtime.checkpoint import read_json
from runtime.errors import CheckpointError, InvalidArgument, InvalidArgumentType

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: the tokenizer of the `tokenizers` library.
        vocab: size of the model's vocabulary; ids from there on are refused.
        options: parsed tokenizer_config.json.
        chat_template: Jinja source, or None for a model without one.

    Raises:
        CheckpointError: the tokenizer's vocabulary is larger than the model's, or its BOS token is unknown to it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        vocab: int,
        options: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        # Tokens added beyond the model's vocabulary are tolerated until used: Gemma 3's text-only checkpoints share
        # their tokenizer with the multimodal ones and so have an image token that the embedding table lacks.
        size = backend.get_vocab_size(with_added_tokens=False)
        if size > vocab:
            raise CheckpointError(f"the tokenizer has {size} tokens, but the model's vocabulary ends at {vocab}")
        backend.no_truncation()
        backend.no_padding()
        options = options or {}
        self._backend = backend
        self._vocab = vocab
        self._chat_template = chat_template
        self._named = {name: _text(options.get(name)) for name in _NAMED if options.get(name) is not None}
        bos = self._named.setdefault("bos_token", "<bos>")
        bos_id = backend.token_to_id(bos)
        if bos_id is None or bos_id >= vocab:
            raise CheckpointError(f"the tokenizer's BOS token {bos!r} is not in the vocabulary of {vocab} tokens")
        self.bos_id: int = bos_id
        self._add_bos = options.get("add_bos_token", True)

    @classmethod
    def from_folder(cls, folder: Path, vocab: int) -> Tokenizer | None:
        """Read the tokenizer of a checkpoint folder.

        Args:
            folder: holds tokenizer.json, and may hold tokenizer_config.json and a chat template.
            vocab: size of the model's vocabulary.

        Returns:
            The tokenizer, or None where the folder has none: such a model works with ids only.

        Raises:
            CheckpointError: the files cannot be read, or disagree with the model's vocabulary.
        """
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises bare Exception
                raise CheckpointError(f"{file} cannot be read: {_one_line(error)}") from error
        elif (folder / "tokenizer.model").is_file():
            raise CheckpointError(
                f"{folder} has a tokenizer.model but no tokenizer.json: make one with transformers' "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        else:
            return None
        options_file = folder / "tokenizer_config.json"
        options = read_json(options_file) if options_file.is_file() else {}
        return cls(backend, vocab, options, _chat_template(folder, options))

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary: every id is below it."""
        return self._vocab

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, BOS first, as Hugging Face's tokenizer gives them.

        Raises:
            TypeError: `text` is not a string.
            ValueError: it holds a token that the model's vocabulary lacks, or cannot be encoded as UTF-8.
        """
        ids = self._encode(text, add_special_tokens=True)
        return [self.bos_id, *ids] if self._add_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def piece(self, token: int) -> str:
        """One token as shown in a listing: its text with spaces as spaces; a byte token as "<0x0A>"."""
        piece = self._backend.id_to_token(token)
        return f"<{token}>" if piece is None else piece.replace("▁", " ")

    def apply_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation under the checkpoint's chat template, ready for the model's turn, with one BOS.

        Args:
            messages: each with a "role" ("user", "assistant", where the template knows it "system") and a "content".

        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
            TypeError: a message is not a mapping with role and content.
        """
        if self._chat_template is None:
            raise InvalidArgument("this model has no chat template (is it a base model?)")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise InvalidArgumentType(f"a message must be a mapping with 'role' and 'content', got {message!r}")
        text = _render(self._chat_template, messages, self._named)
        ids = self._encode(text, add_special_tokens=False)
        while ids[:1] == [self.bos_id]:
            ids = ids[1:]
        return [self.bos_id, *ids]

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
    bad byte turns all of its characters into U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take the next id; return the text that is certain now, "" while a character is incomplete."""
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


def _text(token: Any) -> str:
    """A special token's text: tokenizer_config.json holds it plain or as an object."""
    return token["content"] if isinstance(token, Mapping) else str(token)


def _chat_template(folder: Path, options: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = options.get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"the chat template in {folder} is not text")
    return template


def _render(template: str, messages: Sequence[Mapping[str, Any]], named: Mapping[str, str]) -> str:
    """Render a chat template as transformers does: sandboxed, blocks trimmed, generation prompt added."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **named)
    except (jinja2.TemplateError, TypeError) as error:
        raise InvalidArgument(f"the chat template refuses these messages: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

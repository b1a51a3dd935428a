"""Gemma's usual tokenizer files (those of Google's checkpoints and of converted GGUF files), read without transformers:
1.5 s faster, or 4.5 s with transformers 5.17."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from runtime.checkpoint import gemma_tokenizer
from runtime.checkpoint.files import read_json
from runtime.errors import CheckpointError

_MODEL_TYPES = {"gemma", "gemma2", "gemma3", "gemma3_text"}
# The special tokens of transformers' GemmaTokenizer, unless tokenizer_config.json names others.
_NAMED = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_STANDARD = _NAMED.keys() | {"sep_token", "cls_token"}
# An added token's text and flags, as a tuple: thousands of dicts would trigger a full garbage collection, which takes
# 0.1 s with all of torch's objects.
_fields = operator.attrgetter("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# Gemma's pipeline, and equivalent ones.
_PIPELINE: dict[str, list[Any]] = {
    "normalizer": [gemma_tokenizer.NORMALIZER],
    "pre_tokenizer": [gemma_tokenizer.PRE_TOKENIZER, None],  # never splits: the normalizer leaves no space
    "decoder": [gemma_tokenizer.DECODER],
}
# Options of tokenizer_config.json that never change this tokenizer's ids or text.
_IDLE = {
    *("add_bos_token", "add_eos_token", "backend", "clean_up_tokenization_spaces", "is_local", "legacy"),
    *("local_files_only", "model_max_length", "processor_class", "sp_model_kwargs"),
    *("spaces_between_special_tokens", "use_default_system_prompt"),
}
_READ = {
    *("added_tokens_decoder", "additional_special_tokens", "chat_template", "extra_special_tokens"),
    *("model_specific_special_tokens", "tokenizer_class"),
}
# Files that transformers reads if tokenizer_config.json has no `added_tokens_decoder`.
_LEGACY = ("special_tokens_map.json", "added_tokens.json")
# The beginning of a tokenizer.json without truncation or padding.
_HEAD = re.compile(
    r'\s*\{\s*"version"\s*:\s*"[^"]*"\s*,\s*"truncation"\s*:\s*null\s*,\s*"padding"\s*:\s*null\s*,\s*"added_tokens"\s*:\s*'
)
_HEAD_SIZE = 1 << 22  # Gemma 3 has 6,415 added tokens of 200 characters each


@dataclass(frozen=True)
class StoredTokenizer:
    """A checkpoint's tokenizer: the pipeline, the special tokens by the names that chat templates use, the template."""

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    chat_template: str | None


def read_plain(folder: Path, backend: tokenizers.Tokenizer) -> StoredTokenizer | None:
    """The tokenizer of tokenizer.json, if transformers would use it unchanged; None if it might not.

    Args:
        folder: the checkpoint.
        backend: made from its tokenizer.json; the special tokens that only the other files name are added to it.

    Raises:
        CheckpointError: a file cannot be read.
    """
    config, options = read_json_if_any(folder / "config.json"), read_json_if_any(folder / "tokenizer_config.json")
    named, extra, template = _NAMED | _named(options), _extra(options), options.get("chat_template")
    added = _added_tokens(folder / "tokenizer.json")
    if added is None or not (template is None or isinstance(template, str)):
        return None
    stored = options.get("added_tokens_decoder")
    lists = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")
    by_text = {fields[0]: fields for fields in added.values()}
    is_plain = (
        (not config or config.get("model_type") in _MODEL_TYPES)
        and all(
            file.get("tokenizer_class") in (None, "GemmaTokenizer", "GemmaTokenizerFast") for file in (config, options)
        )
        and options.keys() <= _IDLE | _READ | {key for key in options if key.endswith("_token")}
        and all(isinstance(options.get(name), (list, dict, type(None))) for name in lists)
        and all(isinstance(token, str) for token in (*named.values(), *extra))
        and all(backend.token_to_id(token) is not None for token in named.values())
        and by_text.keys() >= set(extra)
        and added == {token: _fields(entry) for token, entry in backend.get_added_tokens_decoder().items()}
        and (_has_no(folder, *_LEGACY) if stored is None else _stored_tokens(stored) == added)
        and _has_no(folder, "additional_chat_templates")
        and _is_gemmas(backend, named["unk_token"])
    )
    if not is_plain:
        return None
    unmarked = [token for token in named.values() if token not in by_text or not by_text[token][-1]]
    if any(any(by_text[token][1:]) for token in unmarked if token in by_text):
        return None
    # transformers makes every named token special (Google's files omit "<mask>").
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in unmarked])
    return StoredTokenizer(backend, named, template if (file := _template_file(folder)) is None else file)


def _is_gemmas(backend: tokenizers.Tokenizer, unk_token: str) -> bool:
    """Whether transformers would build the same pipeline for its vocabulary."""
    return (
        all(state_of(getattr(backend, stage)) in states for stage, states in _PIPELINE.items())
        and isinstance(backend.model, tokenizers.models.BPE)
        and all(getattr(backend.model, name) == value for name, value in gemma_tokenizer.BPE_OPTIONS.items())
        and backend.model.unk_token == unk_token
    )


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that tokenizer_config.json names, in any layout."""
    own = {key: value for key, value in options.items() if key.endswith("_token") and key not in _IDLE}
    extra, explicit = options.get("extra_special_tokens"), options.get("model_specific_special_tokens")
    if isinstance(extra, dict):
        own |= extra
    if isinstance(explicit, dict) and not own.keys() - _STANDARD:
        own |= explicit
    return own


def _extra(options: Mapping[str, Any]) -> list[Any]:
    """The special tokens that tokenizer_config.json lists without names."""
    lists = (options.get("extra_special_tokens"), options.get("additional_special_tokens"))
    return [token for tokens in lists if isinstance(tokens, list) for token in tokens]


def _added_tokens(file: Path) -> dict[int, Any] | None:
    """The added tokens of a tokenizer.json, parsed without the vocabulary after them, which is megabytes long.

    None if the file begins unusually, truncates or pads, or has an id twice.
    """
    with file.open("rb") as opened:
        text = opened.read(_HEAD_SIZE).decode("utf-8", "ignore")  # the end may cut a character
    head = _HEAD.match(text)
    if head is None:
        return None
    try:
        tokens = json.JSONDecoder().raw_decode(text, head.end())[0]
        by_id = {token.pop("id"): _fields(tokenizers.AddedToken(**token)) for token in tokens}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return by_id if len(by_id) == len(tokens) else None


def _stored_tokens(stored: Any) -> dict[int, Any] | None:
    """The added tokens of tokenizer_config.json's `added_tokens_decoder`, None if malformed."""
    try:
        return {int(token): _fields(tokenizers.AddedToken(**fields)) for token, fields in stored.items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _template_file(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8: {error}") from error


def state_of(stage: Any) -> Any:
    """A stage of a tokenizer's pipeline as in tokenizer.json; None if there is none."""
    return None if stage is None else json.loads(stage.__getstate__())


def read_json_if_any(file: Path) -> dict[str, Any]:
    """A JSON file's object, {} if there is no such file."""
    return read_json(file) if file.is_file() else {}


def _has_no(folder: Path, *names: str) -> bool:
    return not any((folder / name).exists() for name in names)

"""The tokenizer inside a GGUF file, as the contents of a `tokenizer.json`.

Gemma's tokenizer is a SentencePiece BPE. A GGUF file stores its vocabulary without the merges; they follow from it:
every split of a token into two tokens is a merge, ranked by the id of what it makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runtime.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4
_NAMED = {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"}
_MASK = "<mask>"  # transformers' Gemma tokenizer treats it as special whatever its type


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Build the contents of `tokenizer.json` from a GGUF file's metadata.

    Raises:
        CheckpointError: the file has no SentencePiece vocabulary.
    """
    tokens = _spelled(metadata)
    stored = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    ids = {token: index for index, token in enumerate(tokens)}
    named = set(special_tokens(metadata).values()) | {_MASK}
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL or token in named,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        # Runs of spaces are marked user-defined too, but belong to the BPE, which sees them as "▁▁".
        if (kind in (_CONTROL, _USER_DEFINED) and token == stored[index]) or token in named
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _bos_template(metadata, ids),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": special_tokens(metadata)["unknown"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": list(_merges(tokens, ids)),
        },
    }


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Build the contents of `tokenizer_config.json` from a GGUF file's metadata."""
    named = special_tokens(metadata)
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": named["bos"],
        "eos_token": named["eos"],
        "unk_token": named["unknown"],
        "pad_token": named["padding"],
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", True),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    template = metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The text of the bos, eos, unknown and padding tokens."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _NAMED}
    return {name: _NAMED[name] if index is None else tokens[index] for name, index in ids.items()}


def _spelled(metadata: Mapping[str, Any]) -> list[str]:
    """The vocabulary as the tokenizer looks it up: a run of spaces is stored as such, but matched as "▁▁"."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if metadata.get("tokenizer.ggml.model") != "llama" or not tokens:
        raise CheckpointError("the GGUF file has no SentencePiece vocabulary (tokenizer.ggml.model must be 'llama')")
    return ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]


def _merges(tokens: list[str], ids: Mapping[str, int]) -> Iterator[str | list[str]]:
    # Both forms are read; joined by a space, which is ambiguous if a token holds one, they load a third faster.
    joined = not any(" " in token for token in tokens)
    for token in tokens:
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                yield f"{left} {right}" if joined else [left, right]


def _bos_template(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any] | None:
    if not metadata.get("tokenizer.ggml.add_bos_token", True):
        return None
    bos = special_tokens(metadata)["bos"]

    def marker(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": bos, "type_id": type_id}}

    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [marker(0), first],
        "pair": [marker(0), first, marker(1), second],
        "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
    }

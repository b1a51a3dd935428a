"""The pipeline of Gemma's tokenizer, a SentencePiece BPE, in the terms of tokenizer.json."""

from __future__ import annotations

from typing import Any

NORMALIZER: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PRE_TOKENIZER: dict[str, Any] = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
DECODER: dict[str, Any] = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
BPE_OPTIONS: dict[str, Any] = {
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}

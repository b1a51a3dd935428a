"""The vocabulary of a GGUF file from a tokenizer.json: the inverse of tokenizer.py.

Token types and scores are those that llama.cpp's converter gives: special tokens are control tokens; other added ones
are user-defined, with spaces in place of "▁"; the rest, except bytes, rank by their ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.checkpoint import gemma_tokenizer
from runtime.checkpoint.gguf.quick_tokenizer import made, pairs_of
from runtime.checkpoint.gguf.tokenizer import BYTE, BYTE_TOKEN, CONTROL, NORMAL, UNUSED, USER_DEFINED, is_control_like
from runtime.checkpoint.gguf.tokenizer import tokenizer_json as read_back
from runtime.errors import CheckpointError
from runtime.model.config import ModelConfig
from runtime.model.config_fields import shown

UNRANKED, UNUSED_SCORE = -1000.0, -10_000.0


def vocabulary(
    tokenizer: Mapping[str, Any],
    config: ModelConfig,
    unknown: str | None,
    adds_bos: bool,
    chat_template: str | None,
) -> dict[str, Any]:
    """The keys of a tokenizer.

    Args:
        tokenizer: the contents of tokenizer.json.
        config: the model's, for the size of the vocabulary and the special tokens.
        unknown: the text of the unknown token.
        adds_bos: whether a text's ids begin with BOS.
        chat_template: the default one.

    Raises:
        CheckpointError: it is not a SentencePiece BPE of Gemma's kind, or the model ends answers at more tokens than a
            GGUF file names.
    """
    _check_gemmas(tokenizer)
    tokens, types = _tokens(tokenizer, config.vocab)
    scores, rank = [], 0
    for kind in types:
        scores.append({NORMAL: -float(rank), BYTE: 0.0, UNUSED: UNUSED_SCORE}.get(kind, UNRANKED))
        rank += kind == NORMAL
    keys: dict[str, Any] = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types}
    stops = config.stop_token_ids
    if not 1 <= len(stops) <= 3:
        raise CheckpointError(f"a GGUF file names 1 to 3 tokens that end an answer, the model has {len(stops)}")
    ids = {"bos": config.bos_token_id, "padding": config.pad_token_id}
    ids |= {"unknown": tokens.index(unknown) if unknown in tokens else None}
    ids |= dict(zip(("eos", "eot", "eom"), stops, strict=False))
    keys |= {f"{name}_token_id": token for name, token in ids.items() if token is not None}
    keys |= {"add_bos_token": adds_bos, "add_sep_token": False, "add_eos_token": False, "add_space_prefix": False}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    _check_merges(tokenizer, metadata)
    return metadata | ({} if chat_template is None else {"tokenizer.chat_template": chat_template})


def _check_gemmas(tokenizer: Mapping[str, Any]) -> None:
    model = tokenizer["model"]
    if (
        model["type"] != "BPE"
        or any(model.get(name) != value for name, value in gemma_tokenizer.BPE_OPTIONS.items())
        or tokenizer["normalizer"] != gemma_tokenizer.NORMALIZER
        or tokenizer["pre_tokenizer"] not in (gemma_tokenizer.PRE_TOKENIZER, None)
        or tokenizer["decoder"] != gemma_tokenizer.DECODER
    ):
        raise CheckpointError("the tokenizer is not Gemma's SentencePiece BPE, which a GGUF file's must be")
    for added in tokenizer["added_tokens"]:
        if flags := [flag for flag in ("single_word", "lstrip", "rstrip") if added[flag]]:
            raise CheckpointError(f"a GGUF file's tokens have no {flags[0]}, as token {shown(added['content'])} has")


def _tokens(tokenizer: Mapping[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """The text and type of every id."""
    tokens, types = [f"[PAD{index}]" for index in range(vocab)], [UNUSED] * vocab
    for text, index in tokenizer["model"]["vocab"].items():
        if index >= vocab:
            raise CheckpointError(f"token {shown(text)} must have an id below the model's {vocab}, got {index}")
        tokens[index], types[index] = text, BYTE if BYTE_TOKEN.fullmatch(text) else NORMAL
    for added in tokenizer["added_tokens"]:
        if (index := added["id"]) < vocab:  # Gemma 3's text models lack the last, an image's
            is_control = added["special"] or is_control_like(added["content"])
            types[index] = CONTROL if is_control else USER_DEFINED
            tokens[index] = added["content"] if is_control else added["content"].replace("▁", " ")
    return tokens, types


def _check_merges(tokenizer: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Check that the merges are those that follow from the vocabulary, or at least those of them that some text
    needs."""
    read = read_back(metadata)["model"]
    given, every = (pairs_of(model["merges"]) for model in (tokenizer["model"], read))
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    ids = tokenizer["model"]["vocab"]
    ranks = [ids[token] for left, right in given if kinds.get(token := left + right) == NORMAL]
    left_out = set(every).difference(given)
    is_needed = left_out and not left_out.isdisjoint(made(every, read["unk_token"]))
    if ranks != sorted(ranks) or not set(given) <= set(every) or is_needed:
        raise CheckpointError(
            "the tokenizer's merges are not those of a SentencePiece vocabulary, every one in the order of its tokens"
        )

"""A GGUF file's tokenizer as the contents of tokenizer.json and tokenizer_config.json.

The file stores the vocabulary of Gemma's SentencePiece BPE without the merges, which follow from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from runtime.checkpoint import gemma_tokenizer
from runtime.checkpoint.gguf.merges import merges
from runtime.errors import CheckpointError
from runtime.model.config_fields import shown

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # token types
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NAMED = {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"}
_CHAT_TEMPLATE = "tokenizer.chat_template"  # the default one's key; others follow it after a dot
# Special in Google's own checkpoints, whatever type a file gives them: in SentencePiece's terms turns and images are
# "user-defined".
_ALWAYS_SPECIAL = {
    *("<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
}
# Other tokens that are not text: special even if a file types them as normal, since the tokenizer would print them.
_CONTROL_LIKE = re.compile(r"<unused\d+>|<2mass>|\[@BOS@\]")


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Build the contents of `tokenizer.json` from a GGUF file's metadata.

    Raises:
        CheckpointError: the file has no SentencePiece vocabulary, or not one of Gemma's kind.
    """
    _refuse_other_tokenizers(metadata)
    tokens, types = _vocabulary(metadata), _token_types(metadata)
    stored = metadata["tokenizer.ggml.tokens"]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        first = next(index for index, token in enumerate(tokens) if ids[token] != index)
        raise CheckpointError(f"token {shown(tokens[first])} is in the vocabulary twice: {first}, {ids[tokens[first]]}")
    always = _ALWAYS_SPECIAL.union(special_tokens(metadata).values())
    added = []
    for index, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        special = token_type == CONTROL or token in always
        if token_type not in (CONTROL, USER_DEFINED) and not special:
            special = is_control_like(token)
        # Runs of spaces are user-defined too, but belong to the BPE, as "▁▁".
        if special or (token_type == USER_DEFINED and token == stored[index]):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": index, "content": token, **flags, "special": special})
    scores = _per_token(metadata, "scores")
    ranks = (
        None
        if scores is None
        else [score if token_type == NORMAL else None for score, token_type in zip(scores, types, strict=True)]
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": gemma_tokenizer.NORMALIZER,
        "pre_tokenizer": gemma_tokenizer.PRE_TOKENIZER,
        "post_processor": _bos_template(metadata, ids),
        "decoder": gemma_tokenizer.DECODER,
        "model": {
            "type": "BPE",
            **gemma_tokenizer.BPE_OPTIONS,
            "unk_token": special_tokens(metadata).get("unknown"),
            "vocab": ids,
            "merges": merges(tokens, ids, ranks),
        },
    }


def is_control_like(token: str) -> bool:
    """Whether a token that is not marked as special is nevertheless not text."""
    return _CONTROL_LIKE.fullmatch(token) is not None


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Build the contents of `tokenizer_config.json` from a GGUF file's metadata.

    Raises:
        CheckpointError: a chat template is not text.
    """
    named = special_tokens(metadata)
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": named["bos"],
        "eos_token": named.get("eos"),
        "unk_token": named.get("unknown"),
        "pad_token": named.get("padding"),
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", True),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    templates = {
        key.removeprefix(_CHAT_TEMPLATE).removeprefix(".") or "default": template
        for key, template in metadata.items()
        if key == _CHAT_TEMPLATE or key.startswith(f"{_CHAT_TEMPLATE}.")
    }
    for name, template in templates.items():
        if not isinstance(template, str):
            raise CheckpointError(f"chat template {shown(name)} of the GGUF file is not text")
    if templates.keys() == {"default"}:
        return config | {"chat_template": templates["default"]}
    named_templates = [{"name": name, "template": template} for name, template in templates.items()]
    return config | ({"chat_template": named_templates} if named_templates else {})


def has_chat_template(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF file's metadata has a chat template, the default or a named one."""
    return any(key.startswith(_CHAT_TEMPLATE) for key in metadata)


def token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """The id of "bos", "eos", "eot", "eom", "unknown" or "padding", from its key or else from the token's usual text;
    None if there is no such token.

    Raises:
        CheckpointError: the key's value is not an id of the vocabulary.
    """
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    key = f"tokenizer.ggml.{name}_token_id"
    given = metadata.get(key)
    if given is None:
        text = _NAMED.get(name)
        return tokens.index(text) if text in tokens else None
    return _checked_id(key, given, tokens)


def stop_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer: those in the metadata, and for a chat model the end-of-turn token, which some GGUF
    files do not list.

    Raises:
        CheckpointError: a key's value is not an id of the vocabulary.
    """
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    listed = metadata.get("tokenizer.ggml.eos_token_ids", [])
    if not isinstance(listed, list):
        raise CheckpointError(f"tokenizer.ggml.eos_token_ids must be a list, got {shown(listed)}")
    eos = token_id(metadata, "eos")
    stop = [1 if eos is None else eos, token_id(metadata, "eot"), token_id(metadata, "eom")]
    stop += [_checked_id("tokenizer.ggml.eos_token_ids", given, tokens) for given in listed]
    if has_chat_template(metadata) and "<end_of_turn>" in tokens:
        stop.append(tokens.index("<end_of_turn>"))
    return list(dict.fromkeys(index for index in stop if index is not None))


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the bos, eos, unknown and padding tokens, as far as the vocabulary has them.

    Raises:
        CheckpointError: there is no BOS token, or a key's value is not an id of the vocabulary or an empty token's.
    """
    tokens = _vocabulary(metadata)
    ids = {name: token_id(metadata, name) for name in _NAMED}
    if ids["bos"] is None:
        raise CheckpointError("the GGUF file has no tokenizer.ggml.bos_token_id, nor a token '<bos>'")
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    for name, text in named.items():
        if not text:
            raise CheckpointError(f"tokenizer.ggml.{name}_token_id is {ids[name]}, an empty token")
    return named


def _checked_id(key: str, given: Any, tokens: list[str]) -> int:
    if type(given) is not int or given < 0 or (tokens and given >= len(tokens)):
        raise CheckpointError(f"{key} must be an id of the vocabulary, below {len(tokens)}, got {shown(given)}")
    return given


def _refuse_other_tokenizers(metadata: Mapping[str, Any]) -> None:
    model, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if model != "llama" or not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(
            f"the GGUF file has no SentencePiece vocabulary (tokenizer.ggml.model must be 'llama', got {shown(model)})"
        )
    for name in ("add_space_prefix", "add_eos_token", "add_sep_token"):
        if metadata.get(f"tokenizer.ggml.{name}", False) is not False:
            raise CheckpointError(f"tokenizer.ggml.{name} must be false, as it is for Gemma")
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", True)
    if not isinstance(adds_bos, bool):
        raise CheckpointError(f"tokenizer.ggml.add_bos_token must be true or false, got {shown(adds_bos)}")


def _per_token(metadata: Mapping[str, Any], name: str) -> list[Any] | None:
    values, count = metadata.get(f"tokenizer.ggml.{name}"), len(metadata["tokenizer.ggml.tokens"])
    if values is None:
        return None
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(value, int | float) for value in values)
    ):
        given = len(values) if isinstance(values, list) else shown(values)
        raise CheckpointError(f"tokenizer.ggml.{name} must have a number for each of {count} tokens, got {given}")
    return values


def _token_types(metadata: Mapping[str, Any]) -> list[int]:
    return _per_token(metadata, "token_type") or [1] * len(metadata["tokenizer.ggml.tokens"])


def _vocabulary(metadata: Mapping[str, Any]) -> list[str]:
    """The vocabulary as the tokenizer matches it: runs of spaces become "▁▁"."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]


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

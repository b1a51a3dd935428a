"""A checkpoint's tokenizer files as transformers' AutoTokenizer understands them.

transformers does not run tokenizer.json as it stands: for the class that Gemma's checkpoints name it builds a pipeline
of its own around the file's vocabulary, and adds tokens that only the other files name. So the files are read by
transformers itself, unless they are of the plain kind that it would leave as they are, which Google's checkpoints and
converted GGUF files are: importing transformers and building its tokenizer takes 1.5 s longer (4.5 s with 5.17).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from runtime.checkpoint.safetensors_folder import read_json
from runtime.errors import CheckpointError

_MODEL_TYPES = {"gemma", "gemma2", "gemma3", "gemma3_text"}
# The special tokens of transformers' GemmaTokenizer where tokenizer_config.json names no others.
_NAMED = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_STANDARD = _NAMED.keys() | {"sep_token", "cls_token"}
_UNMARKED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
# Its pipeline, and what amounts to the same.
GEMMA_DECODER: dict[str, Any] = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_PIPELINE: dict[str, list[Any]] = {
    "normalizer": [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
    "pre_tokenizer": [_SPLIT, None],  # which never splits, since the normalizer has left no space
    "decoder": [GEMMA_DECODER],
}
_MODEL = {
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}
# Options of tokenizer_config.json that change no id and no text of such a tokenizer, whatever their values.
_IDLE = {
    "add_bos_token",
    "add_eos_token",
    "backend",
    "clean_up_tokenization_spaces",
    "is_local",
    "legacy",
    "local_files_only",
    "model_max_length",
    "processor_class",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "use_default_system_prompt",
}
_READ = {
    "added_tokens_decoder",
    "additional_special_tokens",
    "chat_template",
    "extra_special_tokens",
    "model_specific_special_tokens",
    "tokenizer_class",
}
# Files that count where tokenizer_config.json has no `added_tokens_decoder`.
_LEGACY = ("special_tokens_map.json", "added_tokens.json")
# How a tokenizer.json begins that cuts and pads nothing.
_HEAD = re.compile(
    r'\s*\{\s*"version"\s*:\s*"[^"]*"\s*,\s*"truncation"\s*:\s*null\s*,\s*"padding"\s*:\s*null\s*,\s*"added_tokens"\s*:\s*'
)
_HEAD_SIZE = 1 << 22  # Gemma 3 has 6,415 added tokens of 200 characters each


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files amount to.

    `named` are the special tokens by the names that a chat template knows them by.
    """

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    chat_template: str | None


def read_tokenizer(folder: Path) -> TokenizerFiles | None:
    """Read the tokenizer of a checkpoint folder.

    Returns:
        The tokenizer, or None where the folder has none.

    Raises:
        CheckpointError: transformers cannot read it, or makes something of it that this runtime cannot follow.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        if (folder / "tokenizer.model").is_file():
            raise CheckpointError(
                f"{folder} has a tokenizer.model but no tokenizer.json: make one with transformers' "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file} cannot be read: {_one_line(error)}") from error
    files = _plain(folder, backend) or _by_transformers(folder)
    if files.chat_template is None and (folder / "chat_template.json").is_file():
        # Read by transformers' processors, not by its tokenizers; some multimodal checkpoints have no other.
        template = read_json(folder / "chat_template.json").get("chat_template")
        if isinstance(template, str):
            return TokenizerFiles(files.backend, files.named, template)
    return files


def _plain(folder: Path, backend: tokenizers.Tokenizer) -> TokenizerFiles | None:
    """The tokenizer as tokenizer.json has it, where transformers would make no other; None where it might."""
    config, options = _read(folder / "config.json"), _read(folder / "tokenizer_config.json")
    named, extra, template = _NAMED | _own_names(options), _extra(options), options.get("chat_template")
    added = _added_tokens(folder / "tokenizer.json")
    if added is None or not (template is None or isinstance(template, str)):
        return None
    stored = options.get("added_tokens_decoder")
    lists = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")
    flags = dict(added.values())
    is_plain = (
        (not config or config.get("model_type") in _MODEL_TYPES)
        and all(of.get("tokenizer_class") in (None, "GemmaTokenizer", "GemmaTokenizerFast") for of in (config, options))
        and options.keys() <= _IDLE | _READ | {key for key in options if key.endswith("_token")}
        and all(isinstance(options.get(name), (list, dict, type(None))) for name in lists)
        and all(isinstance(token, str) for token in (*named.values(), *extra))
        and all(backend.token_to_id(token) is not None for token in named.values())
        and flags.keys() >= set(extra)
        and added == {token: _fields(entry) for token, entry in backend.get_added_tokens_decoder().items()}
        and (_has_no(folder, *_LEGACY) if stored is None else _stored_tokens(stored) == added)
        and _has_no(folder, "additional_chat_templates")
        and _is_gemmas(backend, named["unk_token"])
    )
    if not is_plain:
        return None
    unmarked = [token for token in named.values() if not flags.get(token, {}).get("special")]
    if any(flags.get(token, _UNMARKED) != _UNMARKED for token in unmarked):
        return None
    # transformers makes every token that has a name a special one (Google's files leave "<mask>" out).
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in unmarked])
    return TokenizerFiles(backend, named, template if (file := _template_file(folder)) is None else file)


def _by_transformers(folder: Path) -> TokenizerFiles:
    """The tokenizer that transformers makes of a folder."""
    if "auto_map" in _read(folder / "tokenizer_config.json"):
        raise CheckpointError(f"the tokenizer in {folder} is code of its own (auto_map), which is never run")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # files that are wrong in themselves raise anything
        raise CheckpointError(f"transformers cannot read the tokenizer in {folder}: {_one_line(error)}") from error
    kind = type(theirs)
    for method in ("__call__", "_encode_plus", "decode", "_decode", "apply_chat_template"):
        if getattr(kind, method, None) is not getattr(PreTrainedTokenizerFast, method):
            raise CheckpointError(f"the tokenizer in {folder} is a {kind.__name__}, which works in a way of its own")
    backend = theirs.backend_tokenizer
    is_bpe = isinstance(backend.model, tokenizers.models.BPE)
    forced = theirs.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    if theirs.clean_up_tokenization_spaces and (forced or not is_bpe):
        raise CheckpointError(f"the tokenizer in {folder} drops spaces from its text (clean_up_tokenization_spaces)")
    template = theirs.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"the chat template in {folder} is not text but {type(template).__name__}")
    return TokenizerFiles(backend, theirs.special_tokens_map, template)


def _is_gemmas(backend: tokenizers.Tokenizer, unk_token: str) -> bool:
    """Whether transformers would build the same pipeline around its vocabulary."""
    return (
        all(state_of(getattr(backend, part)) in states for part, states in _PIPELINE.items())
        and isinstance(backend.model, tokenizers.models.BPE)
        and all(getattr(backend.model, name) == value for name, value in _MODEL.items())
        and backend.model.unk_token == unk_token
    )


def _own_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that tokenizer_config.json names, in any of the ways that there are."""
    own = {key: value for key, value in options.items() if key.endswith("_token") and key not in _IDLE}
    extra, explicit = options.get("extra_special_tokens"), options.get("model_specific_special_tokens")
    if isinstance(extra, dict):
        own |= extra
    if isinstance(explicit, dict) and not own.keys() - _STANDARD:
        own |= explicit
    return own


def _extra(options: Mapping[str, Any]) -> list[Any]:
    """Those that it lists without a name."""
    lists = (options.get("extra_special_tokens"), options.get("additional_special_tokens"))
    return [token for tokens in lists if isinstance(tokens, list) for token in tokens]


def _added_tokens(file: Path) -> dict[int, Any] | None:
    """The added tokens of a tokenizer.json, which stand before its vocabulary: its millions of letters need no parsing.

    None where the file does not begin as it usually does, where an id comes twice, or where texts are cut or padded.
    """
    with file.open(encoding="utf-8") as opened:
        text = opened.read(_HEAD_SIZE)
    head = _HEAD.match(text)
    if head is None:
        return None
    try:
        tokens = json.JSONDecoder().raw_decode(text, head.end())[0]
        by_id = {
            token["id"]: _fields(tokenizers.AddedToken(**{key: value for key, value in token.items() if key != "id"}))
            for token in tokens
        }
    except (ValueError, TypeError, KeyError):
        return None
    return by_id if len(by_id) == len(tokens) else None


def _stored_tokens(stored: Any) -> dict[int, Any] | None:
    """The same of tokenizer_config.json's `added_tokens_decoder`."""
    try:
        return {int(token): _fields(tokenizers.AddedToken(**fields)) for token, fields in stored.items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _fields(token: tokenizers.AddedToken) -> tuple[str, dict[str, Any]]:
    return token.content, {name: getattr(token, name) for name in _UNMARKED}


def _template_file(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8: {error}") from error


def state_of(part: Any) -> Any:
    """A part of a tokenizer's pipeline as it stands in tokenizer.json, None where there is none."""
    return None if part is None else json.loads(part.__getstate__())


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _has_no(folder: Path, *names: str) -> bool:
    return not any((folder / name).exists() for name in names)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

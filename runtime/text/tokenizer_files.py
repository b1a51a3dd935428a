"""A checkpoint's tokenizer files, read as transformers' AutoTokenizer reads them.

transformers does not use tokenizer.json as it is: for the class that Gemma's checkpoints name, it builds its own
pipeline for the file's vocabulary and adds tokens from the other files. So transformers itself reads the files, unless
it would change nothing (plain_tokenizer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tokenizers

from runtime.checkpoint.files import read_json
from runtime.errors import CheckpointError, one_line
from runtime.text.plain_tokenizer import StoredTokenizer, read_json_if_any, read_plain


def read_tokenizer(folder: Path) -> StoredTokenizer | None:
    """Read the tokenizer of a checkpoint folder.

    Returns:
        The tokenizer, or None if the folder has none.

    Raises:
        CheckpointError: transformers cannot read it, or treats it in a way that this runtime does not support.
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
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from error
    files = read_plain(folder, backend) or _by_transformers(folder)
    if files.chat_template is None and (folder / "chat_template.json").is_file():
        # transformers' processors read this file, its tokenizers do not; some multimodal checkpoints have no other.
        template = read_json(folder / "chat_template.json").get("chat_template")
        if isinstance(template, str):
            return StoredTokenizer(files.backend, files.named, template)
    return files


def has_chat_template(folder: Path) -> bool:
    """Whether a checkpoint folder has a chat template, without reading its tokenizer."""
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    stored = any((folder / name).exists() for name in files)
    return stored or bool(read_json_if_any(folder / "tokenizer_config.json").get("chat_template"))


def _by_transformers(folder: Path) -> StoredTokenizer:
    """The tokenizer that transformers builds from a folder."""
    if "auto_map" in read_json_if_any(folder / "tokenizer_config.json"):
        raise CheckpointError(f"the tokenizer in {folder} needs its own code (auto_map), which is never run")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # malformed files raise anything
        raise CheckpointError(f"transformers cannot read the tokenizer in {folder}: {one_line(error)}") from error
    their_class = type(theirs)
    for method in ("__call__", "_encode_plus", "decode", "_decode", "apply_chat_template"):
        if getattr(their_class, method, None) is not getattr(PreTrainedTokenizerFast, method):
            raise CheckpointError(
                f"the tokenizer in {folder} is a {their_class.__name__}, which is not supported: it overrides {method}"
            )
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
    return StoredTokenizer(backend, theirs.special_tokens_map, template)

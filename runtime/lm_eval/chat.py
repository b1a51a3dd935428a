"""The checkpoint's tokenizer and chat template as transformers applies them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jinja2

from runtime.errors import CheckpointError, InvalidArgument, one_line

_log = logging.getLogger("gemma_runtime")


def load_tokenizer(folder: Path, add_bos_token: bool | None) -> Any:
    """The checkpoint's tokenizer as transformers loads it, which the harness's rules assume.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # malformed tokenizer files raise errors of any kind
        raise CheckpointError(f"transformers cannot load the tokenizer in {folder}: {one_line(error)}") from error


def render_chat(tokenizer: Any, messages: list[dict[str, str]], name: str, **options: Any) -> str:
    """The text of a chat, without system messages if the template refuses them.

    Args:
        tokenizer: the checkpoint's, as `load_tokenizer` returns it.
        messages: with `role` and `content`.
        name: the model's name in errors.
        options: further arguments of transformers' `apply_chat_template`.

    Raises:
        InvalidArgument: there is no template, or it refuses these messages.
    """
    try:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except jinja2.exceptions.TemplateError:
            _log.warning("the chat template failed: leaving out the system messages")
            without_system = [message for message in messages if message["role"] != "system"]
            return tokenizer.apply_chat_template(without_system, tokenize=False, **options)
    except (jinja2.exceptions.TemplateError, ValueError) as error:
        raise InvalidArgument(f"the chat template of {name} cannot be applied: {one_line(error)}") from error

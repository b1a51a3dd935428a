"""`gemma-runtime chat`: a conversation, at a terminal (repl.py) or line by line from a pipe."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli import arguments
from runtime.cli.answer import print_answers
from runtime.cli.exit_codes import DONE, INTERRUPTED
from runtime.cli.sampling import NAMES, add_sampling, sampling_options
from runtime.cli.streams import is_interactive, stdin_lines
from runtime.errors import InvalidArgument

if TYPE_CHECKING:
    from runtime.model.model import Model
    from runtime.text.tokenizer import Tokenizer


def add(commands: arguments.Commands) -> None:
    command = arguments.add_command(
        commands, run, "Talk with an instruction-tuned model.", "Talk with an instruction-tuned model; /help says how."
    )
    arguments.add_model(command, positional=True)
    arguments.add_quantize(command)
    arguments.add_max_seq_len(command)
    command.add_argument("--json", action="store_true", help="print each answer as a line of JSON")
    arguments.add_eager(command)
    arguments.add_answer(command)
    add_sampling(command)


def run(options: argparse.Namespace) -> int:
    _refuse_base_model(options)
    options.sampling = sampling_options(options)
    model = arguments.load(options)
    if model.tokenizer is None:
        raise InvalidArgument(f"chat needs a tokenizer, but {model.name} has none")
    model.tokenizer.apply_chat([{"role": "user", "content": "?"}])  # a template that refuses this refuses every chat
    if not is_interactive():
        return _converse(model, model.tokenizer, options)
    from runtime.cli.repl import Repl

    return Repl(model, model.tokenizer, options).run()


def _refuse_base_model(options: argparse.Namespace) -> None:
    """Refuse a model without a chat template before its weights are downloaded or read."""
    name = arguments.source(options)
    if not _has_chat_template(name, options.quantize):
        raise InvalidArgument(
            f"{name} has no chat template, as a base model has none; it can continue a text: {_as_generate(options)}"
        )


def _has_chat_template(name: str, quantize: str | None) -> bool:
    from runtime.checkpoint import sources
    from runtime.checkpoint.gguf import tokenizer as gguf_tokenizer
    from runtime.checkpoint.gguf.file import shards_of
    from runtime.checkpoint.gguf.header import is_gguf, read_header
    from runtime.text import tokenizer_files

    if name == sources.DEMO:
        return False
    path = Path(name).expanduser()
    if path.is_file() and is_gguf(path):  # its header tells, without converting the file
        return gguf_tokenizer.has_chat_template(read_header(shards_of(path)[0]).metadata)
    return tokenizer_files.has_chat_template(sources.locate(name, quantize=quantize).folder)


def _as_generate(options: argparse.Namespace) -> str:
    """The `generate` command with the same model and options."""
    words = ["PROMPT" if is_interactive() else "-"]
    defaults = {"max_new_tokens": arguments.MAX_NEW_TOKENS, "device": "auto", "dtype": "auto"}
    defaults |= dict.fromkeys(("temperature", "presence_penalty", "frequency_penalty"), 0.0)
    names = (
        "model",
        "revision",
        "device",
        "dtype",
        "threads",
        "quantize",
        "max_seq_len",
        "max_new_tokens",
        "speculate",
    )
    for name in (*names, *NAMES, "json_schema", "regex"):
        value = getattr(options, name)
        if value is not None and value != defaults.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    for text in options.stop or ():
        words += ["--stop", text]
    words += [f"--{name.replace('_', '-')}" for name in ("eager", "json", "no_stream") if getattr(options, name)]
    return shlex.join([arguments.NAME, "generate", *words])


def _converse(model: Model, tokenizer: Tokenizer, options: argparse.Namespace) -> int:
    """Answer stdin's lines, each the user's next turn; /reset starts over, /exit ends."""
    messages: list[dict[str, str]] = []
    for line in stdin_lines():
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            messages = []
        elif text:
            messages.append({"role": "user", "content": text})
            ids = tokenizer.apply_chat(messages)
            (result,), interrupted = print_answers(model, ids, options, options.max_new_tokens, options.json)
            if interrupted:
                return INTERRUPTED
            messages.append({"role": "assistant", "content": result.text})
    return DONE

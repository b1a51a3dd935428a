"""`gemma-runtime chat` at a terminal: a prompt with history and commands around a conversation."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from runtime.cli.answer import print_answers
from runtime.cli.exit_codes import DONE
from runtime.cli.history import history
from runtime.cli.streams import displayed, print_error
from runtime.errors import GemmaRuntimeError, InvalidArgument, OutputError, one_line

if TYPE_CHECKING:
    from runtime.engine.result import GenerationResult
    from runtime.model.model import Model
    from runtime.text.tokenizer import Tokenizer

_HELP = """\
/help          this list
/system TEXT   set the system prompt, for what follows; without TEXT, show it
/save FILE     write the conversation as JSON messages; an existing file is left alone
/stats         the numbers of the last answer
/reset         start over, without a system prompt too
/exit          leave, as Ctrl-D does
Enter sends; Alt-Enter, or a backslash before Enter, starts a new line. A space before a slash makes it text.
Ctrl-C stops an answer, which stays in the conversation, and clears what is being typed."""


class Repl:
    """A conversation at a terminal, until /exit or Ctrl-D.

    Args:
        options: of the command line: `max_new_tokens`, `stop`, `speculate`, `json` and `no_stream` are read.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.system = ""
        self.turns: list[dict[str, str]] = []
        self.last: GenerationResult | None = None
        self.commands = {
            "/help": self._help,
            "/system": self._set_system,
            "/save": self._save,
            "/stats": self._stats,
            "/reset": self._reset,
        }

    def run(self) -> int:
        note(f"{self.model.name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        session = prompt_session()
        while True:
            try:
                text = session.prompt(">>> ", prompt_continuation="... ")
                if text.strip() == "/exit":
                    return DONE
                self._handle(text)
            except EOFError:
                return DONE
            except KeyboardInterrupt:  # at the prompt, or during a command
                continue
            except GemmaRuntimeError as error:
                print_error(one_line(error))

    def messages(self) -> list[dict[str, str]]:
        """The conversation so far."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def _handle(self, text: str) -> None:
        """Run a command, or answer the user's next turn."""
        if not text.startswith("/"):
            if text.strip():
                self._answer(text.strip())
            return
        name, *rest = text.split(maxsplit=1)
        if name not in self.commands:
            raise InvalidArgument(f"there is no command {name!r} (/help lists them)")
        self.commands[name](" ".join(rest).strip())

    def _answer(self, text: str) -> None:
        message = {"role": "user", "content": text}
        ids = self.tokenizer.apply_chat([*self.messages(), message])
        context, limit = self.model.runtime.max_seq_len, self.options.max_new_tokens
        room = context - len(ids)
        if room < 1:
            raise InvalidArgument(
                f"the conversation, {len(ids)} tokens, has outgrown max_seq_len = {context}: /reset starts over"
            )
        (self.last,), interrupted = print_answers(self.model, ids, self.options, min(limit, room), self.options.json)
        self.turns += [message, {"role": "assistant", "content": self.last.text}]
        if self.last.finish_reason == "length" and not interrupted:
            if room <= limit:
                note(f"[cut: the context of {context} tokens is full; /reset starts over, --max-seq-len sets its size]")
            else:
                note(f"[cut after {limit} tokens; ask it to continue, or start with a larger --max-new-tokens]")

    def _help(self, _: str) -> None:
        note(_HELP)

    def _set_system(self, text: str) -> None:
        if text:  # a template without a system role refuses it now
            self.tokenizer.apply_chat([{"role": "system", "content": text}, {"role": "user", "content": "?"}])
            self.system = text
        else:
            note(displayed(self.system) or "no system prompt (/system TEXT sets one)")

    def _save(self, file: str) -> None:
        if not file:
            raise InvalidArgument("/save needs a file name")
        if not self.turns:
            raise InvalidArgument("there is no conversation to save yet")
        try:
            with Path(file).expanduser().open("x", encoding="utf-8") as output:
                output.write(json.dumps(self.messages(), ensure_ascii=False, indent=2) + "\n")
        except (OSError, RuntimeError) as error:  # RuntimeError: "~name" of no user
            raise OutputError(f"cannot write {file}: {getattr(error, 'strerror', None) or error}") from error
        note(f"saved {len(self.messages())} messages")

    def _stats(self, _: str) -> None:
        if self.last is None:
            note("no answer yet")
            return
        used = self.last.stats.prompt_tokens + self.last.stats.new_tokens
        note(f"{self.last.stats} · {used} of {self.model.runtime.max_seq_len} tokens of context")

    def _reset(self, _: str) -> None:
        self.system, self.turns, self.last = "", [], None


def note(text: str) -> None:
    """Print on stderr what is not part of the conversation."""
    print(text, file=sys.stderr)


def prompt_session() -> PromptSession[str]:
    """A prompt of several lines: Enter sends, Alt-Enter or a backslash before Enter starts a line.

    Ctrl-J counts as Enter: a terminal sends it for an Enter typed while an answer is being written.
    """
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    return PromptSession(history=history(), multiline=True, key_bindings=keys, enable_suspend=True)

"""The input history of chats, in a file that only its user can read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

HISTORY_ENV = "GEMMA_RUNTIME_HISTORY"


def history() -> History:
    """The history in $GEMMA_RUNTIME_HISTORY (empty: kept nowhere) or in the user's state folder.

    Where the file cannot be written, the history ends with the process.
    """
    try:
        file = _file()
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
            finally:
                os.close(descriptor)
            return _History(file)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    return InMemoryHistory()


def _file() -> Path | None:
    named = os.environ.get(HISTORY_ENV)
    if named is not None:
        return Path(named).expanduser() if named else None
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "gemma-runtime" / "chat_history"


class _History(FileHistory):
    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):  # a full disk or invalid text must not end the chat
            super().store_string(string)

"""The benchmark's side of an engine's process; peers/serve.py runs in that process."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"
TIMEOUT_S = 900.0  # of one answer: compiling takes minutes


class PeerError(Exception):
    """An engine failed; the message says why."""


class NotInstalled(PeerError):
    """An engine's packages are not installed."""


@contextlib.contextmanager
def needed(what: str) -> Iterator[None]:
    """Raises NotInstalled where a file that an engine needs cannot be had."""
    try:
        yield
    except (ImportError, ValueError) as error:
        raise NotInstalled(f"{what}: {error}") from None


class Worker:
    """One engine in its own process and session. Close it, or use it in a `with` block.

    Args:
        file: the engine's file in peers/, without ".py".
        python: the interpreter that has the engine's packages.
        timeout_s: longest time for one answer.

    Raises:
        NotInstalled, PeerError: the engine did not start.
    """

    def __init__(self, file: str, python: str = sys.executable, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._pending = b""
        self._errors = tempfile.TemporaryFile()
        self._said = 0
        command = [python, str(PEERS / "serve.py"), str(PEERS / f"{file}.py")]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=os.environ | {"PYTHONSAFEPATH": "1"},
                start_new_session=True,  # keeps Ctrl-C from the worker, which the benchmark ends itself
            )
        except OSError as error:
            raise NotInstalled(f"no interpreter {python}: {error.strerror}") from None
        try:
            self.version: str = self._answer()["version"]
        except NotInstalled as error:
            self.close()
            needs = PEERS / f"{file}.txt"
            how = (
                f" (pip install -r {needs}, in an environment of its own: --peer NAME=PYTHON)" if needs.exists() else ""
            )
            raise NotInstalled(f"{error}{how}") from None
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer.

        Raises:
            NotInstalled, PeerError: the engine reported an error, ended or took too long.
        """
        assert self._process.stdin is not None
        self._said = os.fstat(self._errors.fileno()).st_size
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        answer = json.loads(self._line())
        if "error" in answer:
            raise (NotInstalled if answer["missing"] else PeerError)(answer["error"])
        return answer

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise PeerError(f"no answer within {self._timeout_s:,.0f} s")
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    raise PeerError(self._end())
                self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _end(self) -> str:
        """How the process ended, and its last output since the last request."""
        code = self._process.wait()
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._errors.seek(self._said)
        said = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return f"{how}: {last[:300]}" if last else how

    def close(self) -> None:
        """Ends the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

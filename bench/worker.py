"""The benchmark's side of an engine's process; peers/serve.py runs in that process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"
TIMEOUT_S = 900.0  # of one answer: compiling takes minutes


class PeerError(Exception):
    """An engine failed; the message says why."""


class NotInstalled(PeerError):
    """An engine's packages are not installed."""


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
        self._output = tempfile.TemporaryFile()
        self._said = 0
        self._answers, theirs = Pipe()
        command = [python, str(PEERS / "serve.py"), str(PEERS / f"{file}.py"), str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONSAFEPATH": "1"},
                start_new_session=True,  # keeps Ctrl-C from the worker, which the benchmark ends itself
            )
        except OSError as error:
            raise NotInstalled(f"no interpreter {python}: {error.strerror}") from None
        finally:
            theirs.close()
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
        self._said = os.fstat(self._output.fileno()).st_size
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self._answers.send(request)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            if not self._answers.poll(self._timeout_s):
                raise PeerError(f"no answer within {self._timeout_s:,.0f} s")
            answer = self._answers.recv()
        except (EOFError, ConnectionResetError):
            raise PeerError(self._end()) from None
        if "error" in answer:
            raise (NotInstalled if answer["missing"] else PeerError)(answer["error"])
        return answer

    def _end(self) -> str:
        """How the process ended, and its last output since the last request."""
        code = self._process.wait()
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._output.seek(self._said)
        said = self._output.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return f"{how}: {last[:300]}" if last else how

    def close(self) -> None:
        """Ends the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._answers.close()
        self._output.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

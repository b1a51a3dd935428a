"""A server in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx


class ServerProcess:
    """`gemma-runtime serve`, ready for requests.

    Args:
        arguments: of the command.
    """

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "runtime", "serve", *arguments, "--device", "cpu", "--port", "0"]
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        while (found := re.search(r"serving at (http://\S+)", self.log)) is None or not self._is_ready(found[1]):
            assert self.process.poll() is None, self.log
            time.sleep(0.1)
        self.url = found[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def _is_ready(self, url: str) -> bool:
        try:
            return httpx.get(f"{url}/ready").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def memory_bytes(self) -> int:
        """Of this process, in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def metric(self, name: str) -> float:
        """A metric, summed over its labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line))

    def wait(self) -> int:
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@contextmanager
def server_process(*arguments: str) -> Iterator[ServerProcess]:
    server = ServerProcess(*arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()

"""`gemma-runtime serve` as a process."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys

import httpx2 as httpx
import pytest

from runtime.cli import serve
from runtime.cli.main import main, parser

pytestmark = pytest.mark.newest_only


@pytest.mark.serve
def test_it_serves_until_it_is_asked_to_end(tiny_folder):
    command = [sys.executable, "-m", "runtime", "serve", str(tiny_folder), "--device", "cpu", "--port", "0"]
    limits = ["--max-seq-len", "128", "--max-batch", "4"]
    process = subprocess.Popen([*command, *limits], stderr=subprocess.PIPE, text=True)
    try:
        log = ""
        while (found := re.search(r"tiny: 4 rows, serving at http://(127\.0\.0\.1:\d+)$", log, re.MULTILINE)) is None:
            line = process.stderr.readline()
            assert line, log
            log += line
        with httpx.Client(base_url=f"http://{found[1]}", transport=httpx.HTTPTransport(retries=9)) as client:
            answer = client.post("/v1/completions", json={"prompt": "the dog", "max_tokens": 3, "ignore_eos": True})
            assert answer.json()["model"] == "tiny" and answer.json()["usage"]["completion_tokens"] == 3
            assert "gemma_runtime:read_bandwidth_bytes_per_second" in client.get("/metrics").text
            assert str(tiny_folder.parent) not in client.get("/v1/models").text, "no path of this machine"
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "draining" in rest and "Traceback" not in rest


def test_nobody_else_is_let_in_unless_asked_for():
    options = parser().parse_args(["serve", "demo"])
    assert (options.host, options.api_key, options.cors_origin, options.max_batch) == ("127.0.0.1", None, [], "auto")


def test_an_address_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "demo", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"gemma-runtime: error: cannot listen at 127.0.0.1, port {port}: Address already in use\n"
    )


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "runtime.serve.server", None)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "runtime.serve.server")
    for name in [name for name in sys.modules if name.startswith("runtime.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve", "demo"]) == 2
    assert "serve needs fastapi: pip install 'gemma-runtime[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["0", "65", "many"])
def test_rows(rows, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["serve", "demo", "--max-batch", rows])
    assert "1 to 64" in capsys.readouterr().err or rows == "many"
    assert serve._rows("auto") == "auto"

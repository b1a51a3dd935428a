"""`gemma-runtime serve` as a process."""

from __future__ import annotations

import re
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from runtime.cli import serve
from runtime.cli.main import main, parser

from .conftest import eventually
from .process import server_process

pytestmark = pytest.mark.newest_only


@pytest.mark.serve
def test_it_serves_until_it_is_asked_to_end_twice(tiny_folder):
    with server_process(str(tiny_folder), "--max-seq-len", "128", "--max-batch", "4") as server:
        assert re.search(rf"tiny: 4 rows, serving at {server.url}$", server.log, re.MULTILINE)
        assert server.url.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answer = client.post("/v1/completions", json={"prompt": "the dog", "max_tokens": 3, "ignore_eos": True})
            assert answer.json()["model"] == "tiny" and answer.json()["usage"]["completion_tokens"] == 3
            assert server.metric("gemma_runtime:read_bandwidth_bytes_per_second") > 0
            assert str(tiny_folder.parent) not in client.get("/v1/models").text, "no path of this machine"
            long = {"prompt": ["the dog"] * 60, "max_tokens": 110, "ignore_eos": True}
            with ThreadPoolExecutor() as pool:
                asked = pool.submit(client.post, "/v1/completions", json=long)
                assert eventually(lambda: server.metric("vllm:num_requests_running") == 4)
                server.process.send_signal(signal.SIGTERM)
                assert eventually(lambda: "draining" in server.log) and not asked.done()
                server.process.send_signal(signal.SIGINT)
        assert asked.result().status_code == 503 and asked.result().json()["error"]["code"] == "shutting_down"
        assert server.wait() == 0, server.log
        assert "Traceback" not in server.log


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

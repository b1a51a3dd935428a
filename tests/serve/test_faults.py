"""Clients that die, flood and lie."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from collections import Counter

import httpx2 as httpx
import pytest

from runtime.engine.scheduler import scheduler_of
from runtime.engine.stream import Stream

from .conftest import eventually, listening

pytestmark = [pytest.mark.serve, pytest.mark.newest_only]

LONG = {"prompt": "the dog", "max_tokens": 100, "ignore_eos": True}


def is_idle(server):
    admission, scheduler = server.service.admission, scheduler_of(server.service.model)
    return not (admission.answers or admission.responses or scheduler.running or scheduler.waiting)


def test_a_client_that_is_killed_frees_its_row(server, steps, monkeypatch):
    cancel, noticed = Stream.cancel, []
    monkeypatch.setattr(Stream, "cancel", lambda stream: (noticed.append(steps.count), cancel(stream)))
    steps.seconds = 0.05
    code = f"""
import httpx2, sys
with httpx2.stream("POST", "http://127.0.0.1:{server.port}/v1/completions", json={LONG | {"stream": True}}) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as client:
        assert client.stdout.readline().startswith(b"data: ")
        os.kill(client.pid, signal.SIGKILL)
        assert eventually(lambda: is_idle(server))
        assert steps.count - noticed[0] <= 1, "the step under way"
        assert steps.count < 100


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_ten_megabytes(server, kind):
    prompt = "dog " * 2_500_000
    body = {"prompt": prompt} if kind == "completions" else {"messages": [{"role": "user", "content": prompt}]}
    url = f"http://127.0.0.1:{server.port}"
    response = httpx.post(f"{url}/v1/{kind}", json=body, timeout=60)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_a_prompt_as_long_as_a_body_may_be(server):
    body = {"prompt": "dog " * 1_000_000, "max_tokens": 1}
    response = httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_garbage(server):
    for sent in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9\r\n\r\n", b"POST " + b"a" * 100_000):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(sent)
            connection.settimeout(5)
            assert connection.recv(999).startswith((b"HTTP/1.1 400", b"HTTP/1.1 404"))
    assert httpx.get(f"http://127.0.0.1:{server.port}/health").status_code == 200


@pytest.fixture
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"needs 4,096 open files, the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_half_open_connections_keep_nobody_out(server, many_files):
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(500)]
    for connection in silent[::2]:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
    response = httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=LONG | {"max_tokens": 2}, timeout=30)
    assert response.status_code == 200
    for connection in silent:
        connection.close()
    assert eventually(lambda: not server.server_state.connections)


def test_a_thousand_connect_at_once(server, many_files):
    async def ask(client, index):
        return await client.post("/v1/completions", json=LONG | {"max_tokens": 1 + index % 8, "seed": index})

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", limits=limits, timeout=120) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(1000)))

    responses = asyncio.run(all_of_them())
    counted = Counter(response.status_code for response in responses)
    print(counted)
    assert counted.keys() <= {200, 429} and counted[200] >= 68, counted
    for index, response in enumerate(responses):
        if response.status_code == 200:
            assert response.json()["usage"]["completion_tokens"] == 1 + index % 8
        else:
            assert response.json()["error"]["code"] == "queue_full" and response.headers["retry-after"]
    assert eventually(lambda: is_idle(server))


def test_connections_come_and_go(model):
    with listening(model) as server:
        for _ in range(300):
            socket.create_connection(("127.0.0.1", server.port)).close()
        assert eventually(lambda: not server.server_state.connections)
        assert httpx.get(f"http://127.0.0.1:{server.port}/health").status_code == 200

"""Servers in this process on the tiny model: one that a client speaks to without a socket, and one that listens."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from runtime.engine.scheduler import scheduler_of

from ..runtime.conftest import tiny_folder as tiny_folder

NAME = "tiny"
TOOL_TEMPLATE = """{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{%- for message in messages -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\n' + message.content }}
{%- for call in message.tool_calls or [] -%}
{{ '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '</tool_call>' }}
{%- endfor -%}
{{ '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


@pytest.fixture(scope="session")
def model(tiny_folder: Path) -> Any:
    """The tiny model: float32 on the CPU, 128 tokens, 4 rows."""
    from runtime.api import load

    return load(tiny_folder, device="cpu", max_seq_len=128, max_batch=4, progress=False)


@pytest.fixture(scope="session")
def tool_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template that takes tools, and a window that leaves room for the prefix cache."""
    folder = tmp_path_factory.mktemp("tools") / "tiny"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 256}))
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return folder


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[TestClient]:
    """A client of an application on a model, while that runs."""
    from runtime.serve.app import application
    from runtime.serve.service import Settings

    with TestClient(application(model, Settings((NAME, "other"), **settings)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def client(model: Any) -> Iterator[TestClient]:
    with serving(model) as client:
        yield client


@pytest.fixture(scope="session")
def tool_model(tool_folder: Path) -> Any:
    """That model: 256 tokens, 4 rows, chunks of 64 tokens."""
    from runtime.api import load

    model = load(tool_folder, device="cpu", max_seq_len=256, max_batch=4, progress=False)
    return dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, prefill_chunk=64))


@pytest.fixture(scope="session")
def tool_client(tool_model: Any) -> Iterator[TestClient]:
    with serving(tool_model) as client:
        yield client


@pytest.fixture
def serve(model: Any) -> Callable[..., Any]:
    """A function that makes a client of a server with other settings."""
    return lambda **settings: serving(model, **settings)


@contextmanager
def listening(model: Any, drain_s: float = 5.0, **settings: Any) -> Iterator[Any]:
    """A real server in a thread, at a free port of the loopback device: `server.port`, `server.service`."""
    from runtime.serve.app import application
    from runtime.serve.server import Connection, Server
    from runtime.serve.service import Settings

    app = application(model, Settings((NAME,), **settings))
    config = uvicorn.Config(
        app, port=0, http=Connection, loop="asyncio", ws="none", log_config=None, timeout_graceful_shutdown=2
    )
    server: Any = Server(config, app.state.service, drain_s)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    server.service, server.port = app.state.service, server.servers[0].sockets[0].getsockname()[1]
    server.thread = thread
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[Any]:
    with listening(model) as server:
        yield server


class Steps:
    """Decode steps of a model, slowed down and counted."""

    def __init__(self) -> None:
        self.seconds, self.count = 0.0, 0


@pytest.fixture
def steps(model: Any, monkeypatch: pytest.MonkeyPatch) -> Steps:
    device, slowed = scheduler_of(model)._device, Steps()
    launch = device.launch

    def slowly(*arguments: Any, **named: Any) -> None:
        time.sleep(slowed.seconds)
        slowed.count += 1
        launch(*arguments, **named)

    monkeypatch.setattr(device, "launch", slowly)
    return slowed


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something comes to hold."""
    ends = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > ends:
            return False
        time.sleep(0.005)
    return True


def read_in_pieces(reader, text, size):
    """What a CallReader makes of a text that comes so many characters at a time: what is said, and the calls."""
    parts = [part for at in range(0, len(text), size) for part in reader.push(text[at : at + size])]
    said = "".join(part for part in parts if isinstance(part, str)) + reader.finish()
    return said, [(part.function.name, part.function.arguments) for part in parts if not isinstance(part, str)]


def events(text: str) -> list[Any]:
    """What server-sent events say, the last one's word included."""
    said = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in said]


def refused(response: Any, status: int) -> Any:
    """The error of a response, which has the shape of one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and "\n" not in body["error"]["message"]
    return body["error"]

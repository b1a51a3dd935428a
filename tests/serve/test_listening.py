"""A real server on a socket: clients that go away, read slowly or say nothing, a full queue, and the way down."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from pathlib import Path

import httpx2 as httpx
import pytest

import runtime
from runtime.engine.scheduler import scheduler_of
from runtime.engine.stream import Stream
from runtime.serve import body_limit
from runtime.serve import server as server_module
from runtime.serve.server import Connection

from .conftest import events, eventually, listening

pytestmark = pytest.mark.newest_only

LONG = {"prompt": "the dog", "max_tokens": 100, "ignore_eos": True}


def request(body):
    """A request as it is sent."""
    content = json.dumps(body)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode()


def send(server, body):
    """A connection on which a request has been sent."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(request(body))
    return connection


def post(server, body, **options):
    return httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=body, timeout=30, **options)


def is_idle(server):
    admission, scheduler = server.service.admission, scheduler_of(server.service.model)
    return not (admission.answers or admission.responses or scheduler.running or scheduler.waiting)


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_row(server, steps, streams, monkeypatch):
    cancel, noticed = Stream.cancel, []
    monkeypatch.setattr(Stream, "cancel", lambda stream: (noticed.append(steps.count), cancel(stream)))
    steps.seconds = 0.05
    began = steps.count
    connection = send(server, LONG | {"stream": streams})
    assert eventually(lambda: steps.count > began + 2)
    connection.close()
    assert eventually(lambda: is_idle(server))
    assert steps.count - noticed[0] <= 1, "the step under way"


def test_one_that_goes_away_while_it_waits_is_never_run(server, model, steps):
    steps.seconds = 0.02
    running = [send(server, LONG | {"stream": True}) for _ in range(4)]
    assert eventually(lambda: scheduler_of(model).running == 4)
    waiting = send(server, LONG)
    assert eventually(lambda: scheduler_of(model).waiting == 1)
    waiting.close()
    assert eventually(lambda: scheduler_of(model).waiting == 0)
    assert scheduler_of(model).running == 4
    for connection in running:
        connection.close()
    assert eventually(lambda: is_idle(server))


def test_a_full_queue(model, steps):
    steps.seconds = 0.02
    with listening(model, max_queue=1) as server:
        held = [send(server, LONG | {"stream": True}) for _ in range(5)]
        assert eventually(lambda: server.service.admission.answers == 5)
        refusal = post(server, LONG)
        assert (refusal.status_code, refusal.headers["retry-after"]) == (429, "1")
        assert refusal.json()["error"]["code"] == "queue_full"
        for connection in held:
            connection.close()
        assert eventually(lambda: post(server, LONG | {"max_tokens": 1}).status_code == 200)


@pytest.mark.serve
def test_a_slow_reader_holds_up_nobody_and_is_given_up(model, monkeypatch, caplog):
    made = Connection.connection_made

    def made_small(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(Connection, "connection_made", made_small)
    monkeypatch.setattr(server_module, "READ_TIMEOUT_S", 2.5)
    with listening(model, max_queue=4) as server, caplog.at_level("INFO", "gemma_runtime"):
        slow = [socket.socket() for _ in range(6)]
        for connection in slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(request(LONG | {"max_tokens": 120, "logprobs": 20, "stream": True}))
        admission = server.service.admission
        assert eventually(lambda: admission.responses == 6 and not admission.answers), "rows do not wait for readers"
        assert post(server, LONG | {"max_tokens": 4}).status_code == 200
        assert admission.responses == 6
        assert eventually(lambda: is_idle(server))
        assert eventually(lambda: not server.server_state.connections)
        assert caplog.text.count("a client has not read for 2.5 seconds") == 6
        for connection in slow:
            connection.close()


def test_connections_that_say_nothing_are_closed(model, monkeypatch):
    monkeypatch.setattr(server_module, "HEADERS_TIMEOUT_S", 0.3)
    monkeypatch.setattr(body_limit.BodyLimit.__init__, "__defaults__", (body_limit.MOST_BYTES, 0.3))
    with listening(model) as server:
        silent, half, slow = (socket.create_connection(("127.0.0.1", server.port)) for _ in range(3))
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost")
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        for connection in (silent, half):
            connection.settimeout(5)
            assert connection.recv(1) == b""
        slow.settimeout(5)
        assert slow.recv(9999).startswith(b"HTTP/1.1 408")
        assert post(server, LONG | {"max_tokens": 1}).status_code == 200
        for connection in (silent, half, slow):
            connection.close()


def test_draining_finishes_what_is_under_way(model, steps):
    expected = runtime.generate(model, LONG["prompt"], max_new_tokens=100, ignore_eos=True)
    steps.seconds = 0.01
    with listening(model) as server, httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as other:
        assert other.get("/ready").status_code == 200
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(server, LONG)))
        thread.start()
        assert eventually(lambda: scheduler_of(model).running == 1)
        server.handle_exit(signal.SIGTERM, None)
        refusal = other.post("/v1/completions", json=LONG)
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
        assert refusal.json()["error"]["code"] == "shutting_down"
        assert other.get("/ready").status_code == 503 and other.get("/health").status_code == 200
        thread.join()
        assert answers[0].json()["choices"][0]["text"] == expected.text
        assert eventually(lambda: not server.thread.is_alive())


@pytest.mark.parametrize("streams", [True, False])
def test_what_does_not_finish_in_time_is_told_so(model, steps, streams):
    steps.seconds = 0.05
    with listening(model, drain_s=0.3) as server:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(server, LONG | {"stream": streams})))
        thread.start()
        assert eventually(lambda: server.service.admission.responses == 1)
        server.handle_exit(signal.SIGTERM, None)
        thread.join()
        said = events(answers[0].text)[-1] if streams else answers[0].json()
        assert said["error"]["code"] == "shutting_down"
        assert answers[0].status_code == (200 if streams else 503)
        assert eventually(lambda: not server.thread.is_alive())


def test_many_at_once_get_what_each_gets_alone(server, model):
    bodies = [
        {"prompt": prompt, "max_tokens": 10 + index, "temperature": index % 2, "seed": index, "return_token_ids": True}
        for index, prompt in enumerate(["the dog", "A", "snow, snow", "the"] * 4)
    ]
    tokens: dict[int, list[int]] = {}

    def ask(index):
        if index % 3:
            tokens[index] = post(server, bodies[index]).json()["choices"][0]["token_ids"]
            return
        said = events(post(server, bodies[index] | {"stream": True}).text)
        tokens[index] = [token for part in said[:-1] for token in part["choices"][0]["token_ids"]]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, body in enumerate(bodies):
        alone = runtime.generate(
            model, body["prompt"], max_new_tokens=body["max_tokens"], temperature=body["temperature"], seed=index
        )
        assert tuple(tokens[index]) == alone.token_ids, body
    assert eventually(lambda: is_idle(server))


def test_a_call_of_the_same_process_and_the_server_share_the_model(server, model, steps):
    steps.seconds = 0.005
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(server, LONG)))
    thread.start()
    assert eventually(lambda: scheduler_of(model).running == 1)
    own = runtime.generate(model, "A", max_new_tokens=30, ignore_eos=True)
    assert not answers, "the server's answer is still under way"
    thread.join()
    assert own.token_ids == runtime.generate(model, "A", max_new_tokens=30, ignore_eos=True).token_ids
    expected = runtime.generate(model, LONG["prompt"], max_new_tokens=100, ignore_eos=True)
    assert answers[0].json()["choices"][0]["text"] == expected.text


def test_metrics_count(server, model, steps):
    def value(name, text):
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def metrics():
        return httpx.get(f"http://127.0.0.1:{server.port}/metrics").text

    before = metrics()
    post(server, LONG | {"max_tokens": 7, "n": 2, "temperature": 1})
    post(server, LONG | {"prompt": ""})
    after = metrics()
    grown = {
        name: value(name, after) - value(name, before)
        for name in (
            "vllm:prompt_tokens_total",
            "vllm:generation_tokens_total",
            "vllm:time_to_first_token_seconds_count",
            "vllm:inter_token_latency_seconds_count",
            "vllm:e2e_request_latency_seconds_count",
            'vllm:request_success_total{finished_reason="length"',
            'gemma_runtime:http_responses_total{path="/v1/completions",status="200"}',
            'gemma_runtime:http_responses_total{path="/v1/completions",status="400"}',
        )
    }
    assert list(grown.values()) == [8, 14, 2, 12, 1, 2, 1, 1], grown
    read = value("gemma_runtime:decode_read_bytes_total", after) - value(
        "gemma_runtime:decode_read_bytes_total", before
    )
    assert read >= 6 * model.plan.weights_read
    steps.seconds = 0.02
    connection = send(server, LONG | {"stream": True})
    assert eventually(lambda: value("vllm:num_requests_running", metrics()) == 1)
    assert 0 < value("vllm:kv_cache_usage_perc", metrics()) < 1
    connection.close()
    assert eventually(lambda: value("vllm:num_requests_running", metrics()) == 0)
    assert value('vllm:request_success_total{finished_reason="abort"', metrics()) >= 1


def test_the_log_names_requests_and_says_nothing_of_them(server, caplog):
    with caplog.at_level("INFO", "gemma_runtime"):
        post(server, LONG | {"max_tokens": 3}, headers={"x-request-id": "mine"})
        post(server, LONG | {"prompt": ["the dog"], "tempo": "the dog"}, headers={"x-request-id": "yours"})
        assert eventually(lambda: "unknown_parameter tempo id=yours" in caplog.text)
    (line,) = [record.getMessage() for record in caplog.records if "id=mine" in record.getMessage()]
    assert line.startswith("POST /v1/completions 200 ") and "prompt=8 new=3" in line
    assert "the dog" not in caplog.text


def test_the_dashboard_shows_metrics_that_there_are(client):
    text = client.get("/metrics").text
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    dashboard = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text()
    named = set(re.findall(r"(?:vllm|gemma_runtime):\w+", dashboard))
    assert len(named) > 12 and {name.removesuffix("_bucket") for name in named} <= families
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    documented = set(re.findall(r"(?:vllm|gemma_runtime):\w+", page))
    assert documented == {name for name in families if not name.endswith("_created")}


def test_the_table_of_servers_is_the_files():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "serving.md").read_text()
    rows = json.loads((root / "bench" / "results" / "serve-cpu.json").read_text())["rows"]
    for server, weights in dict.fromkeys((row["server"], row["weights"]) for row in rows):
        of = [row for row in rows if (row["server"], row["weights"]) == (server, weights)]
        assert [row["streams"] for row in of] == [1, 8, 16]
        speeds = " | ".join(f"{row['output_tokens_per_second']['mean']:.1f}" for row in of)
        waits = " / ".join(f"{row['time_to_first_token_ms']['median'] / 1e3:.1f}" for row in of)
        assert f"| {server} | {weights} | {speeds} | {waits} s |" in page

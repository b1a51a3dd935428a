"""What is refused before a body is read: paths, methods, headers, and what is no HTTP at all."""

from __future__ import annotations

import gzip
import json
import socket

import httpx2 as httpx
import pytest

from runtime.serve import body_limit

from .conftest import refused

pytestmark = pytest.mark.newest_only

GOOD = {"prompt": "the dog", "max_tokens": 4}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_body_of_another_type_is_not_read(client):
    """A web page can send one anywhere without asking."""
    response = client.post("/v1/completions", content=json.dumps(GOOD), headers={"content-type": "text/plain"})
    assert "application/json" in refused(response, 400)["message"]


def test_unknown_places(client):
    assert refused(client.get("/v1/nothing"), 404)["code"] == "unknown_url"
    assert refused(client.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    assert client.get("/v1/completions").headers["allow"] == "POST"
    for path in ("/v1/completions/", "/health/"):  # a redirect would lose the method or the scheme
        assert refused(client.post(path, json=GOOD), 404)["code"] == "unknown_url"
    for response in (client.post("/v1/completions", json=GOOD | {"model": "x"}), client.get("/v1/models/a/b")):
        error = refused(response, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found") and "'tiny'" in error["message"]


def test_head_asks_wherever_get_may(client):
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny", "/openapi.json", "/"):
        head, whole = client.head(path), client.get(path)
        assert head.status_code == whole.status_code == 200
        assert head.headers["content-type"] == whole.headers["content-type"]
    assert client.head("/v1/completions").status_code == 405
    assert all("head" not in methods for methods in client.get("/openapi.json").json()["paths"].values())


def test_names_of_the_model(client):
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "other"]
    assert client.get("/v1/models/other").json()["max_model_len"] == 128
    assert client.post("/v1/completions", json=GOOD | {"model": "other"}).json()["model"] == "other"


@pytest.mark.parametrize("announced", [True, False])
def test_large_bodies(client, announced):
    content = b'{"prompt": "' + b"a" * body_limit.MOST_BYTES + b'"}'
    sent = content if announced else (content[at : at + 65536] for at in range(0, len(content), 65536))
    response = client.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
    assert refused(response, 413)["code"] == "body_too_large"


def test_compressed_bodies(client):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    error = refused(client.post("/v1/completions", content=gzip.compress(b"{}"), headers=headers), 415)
    assert error["code"] == "unsupported_encoding" and "'gzip'" in error["message"]


def test_request_ids(client):
    assert client.get("/health", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    for given in ("a b", "x" * 129, "a\tb", "é"):
        made = client.get("/health", headers={"x-request-id": given.encode()}).headers["x-request-id"]
        assert made != given and len(made) == 32


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\x0bb\r\n\r\n",
    ],
    ids=["no text", "no host", "negative length", "two lengths", "compressed", "no chunk", "control character"],
)
def test_what_is_no_http_is_refused_in_the_same_shape(server, sent):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(sent)
        said = b"".join(iter(lambda: connection.recv(999), b""))
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_garbage_after_a_refusal_closes_the_connection(server, caplog):
    chunk = b"%x\r\n" % (body_limit.MOST_BYTES + 1) + b"x" * (body_limit.MOST_BYTES + 1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
        assert connection.recv(99).startswith(b"HTTP/1.1 413")
        try:
            connection.sendall(b"zz\r\n")
            while connection.recv(999):
                pass
        except ConnectionError:  # what was not read makes it a reset
            pass
    assert "Traceback" not in caplog.text
    assert httpx.get(f"http://127.0.0.1:{server.port}/health").status_code == 200

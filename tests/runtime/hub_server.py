"""A small hub on loopback: lists of files, `resolve` with ETags, ranges and a redirect of weights to another host, as
the real one does it; what was asked for is recorded, and any path can be made to fail."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Handler = Callable[["Exchange"], None]


@dataclass(frozen=True)
class Request:
    """What a client asked for, and how many bytes of content it was given."""

    method: str
    path: str
    authorization: str | None
    sent: int


@dataclass
class Hub:
    """What the hub has and what it was asked.

    `models` is name -> path -> content; `faults` is a part of a path -> what answers in place of the hub.
    """

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    datasets: set[str] = field(default_factory=set)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    faults: dict[str, Handler] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    chunk_delay_s: float = 0.0
    ranges: bool = True
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, folder: Path, **more: bytes) -> None:
        self.models[name] = {path.name: path.read_bytes() for path in folder.iterdir()} | more

    def paths(self, method: str = "GET") -> list[str]:
        """The paths of this method's requests, without the host and without what is the same in all."""
        return [request.path for request in self.requests if request.method == method]

    def sent(self, suffix: str) -> int:
        """Bytes of content that went out for paths that end so."""
        return sum(request.sent for request in self.requests if request.path.endswith(suffix))


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    sent = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.sent = 0
        try:
            fault = next((fault for part, fault in self.hub.faults.items() if part in self.path), None)
            (fault or Exchange._answer)(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has gone
        finally:
            asked = Request(self.command, unquote(self.path), self.headers.get("Authorization"), self.sent)
            self.hub.requests.append(asked)

    do_HEAD = do_GET

    def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        """Send an answer; in the names of headers _ stands for -."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for start in range(0, len(content) if self.command == "GET" else 0, 1 << 16):
            self.wfile.write(content[start : start + (1 << 16)])
            self.sent += len(content[start : start + (1 << 16)])
            time.sleep(self.hub.chunk_delay_s)

    def _answer(self) -> None:
        parts = unquote(self.path).lstrip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._list("/".join(parts[2:4]), "/".join(parts[5:]))
        elif parts[:2] == ["api", "datasets"] and "/".join(parts[2:4]) in self.hub.datasets:
            self.reply(200, json.dumps({"siblings": []}).encode())
        elif parts[0] == "cdn":
            self._content(self.hub.models["/".join(parts[1:3])]["/".join(parts[3:])])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), *self._revision_and_path(parts[3:]))
        else:
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def _revision_and_path(self, parts: list[str]) -> tuple[str, str]:
        known = [*self.hub.revisions, *self.hub.revisions.values()]
        for cut in range(1, len(parts)):
            if "/".join(parts[:cut]) in known:
                return "/".join(parts[:cut]), "/".join(parts[cut:])
        return parts[0], "/".join(parts[1:])

    def _commit(self, name: str, revision: str) -> str | None:
        if name not in self.hub.models:
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        commit = self.hub.revisions.get(revision, revision)
        if commit not in self.hub.revisions.values():
            self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
            return None
        return commit

    def _list(self, name: str, revision: str) -> None:
        if commit := self._commit(name, revision):
            siblings = [{"rfilename": path} for path in self.hub.models[name]]
            document = {"id": name, "sha": commit, "siblings": siblings}
            self.reply(200, json.dumps(document).encode(), Content_Type="application/json")

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if not (commit := self._commit(name, revision)):
            return
        content = self.hub.models[name].get(path)
        if content is None:
            self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
        elif path.endswith(".safetensors"):
            self.reply(
                302,
                Location=f"http://localhost:{self.hub.port}/cdn/{name}/{path}",
                X_Repo_Commit=commit,
                X_Linked_ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                X_Linked_Size=str(len(content)),
            )
        else:
            self._content(content, X_Repo_Commit=commit)

    def _content(self, content: bytes, **headers: str) -> None:
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        asked = self.headers.get("Range", "") if self.hub.ranges else ""
        if not asked:
            length = {"Content_Length": str(len(content))} if self.command == "HEAD" else {}
            self.reply(200, content, **headers, **length)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        end = int(first) + len(part) - 1
        self.reply(206, part, Content_Range=f"bytes {first}-{end}/{len(content)}", **headers)


def failing(status: int, content: bytes = b"", **headers: str) -> Handler:
    """A fault: this answer to whatever is asked."""
    return lambda exchange: exchange.reply(status, content, **headers)


def stalling(seconds: float, after_headers: bool = False) -> Handler:
    """A fault: no answer, or headers and no content, for a while."""

    def stall(exchange: Exchange) -> None:
        if after_headers:
            exchange.reply(200, Content_Length="1000000")
        time.sleep(seconds)
        exchange.close_connection = True

    return stall


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Exchange", (Exchange,), {"hub": hub}))
    server.daemon_threads = True
    server.block_on_close = False
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

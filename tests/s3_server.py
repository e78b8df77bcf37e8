"""A real S3 protocol server on loopback, behind a proxy that fails as it is told to.

moto's server keeps the objects; it runs in a process of its own. Between it and the client stands an HTTP proxy in this
process, which passes everything on until a ``Fault`` says otherwise. ``s3_url`` is an empty place in a fresh bucket,
with the environment that ``open_place`` and every command need to reach it; ``faults`` is what goes wrong there.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

KINDS = ("500", "503", "drop", "lost answer", "half request", "half body", "short body", "stalled body", "slow")
"""What can go wrong; all but "lost answer" leave the store as it was.

500, 503: an error answer (503 is S3's SlowDown). drop: the connection ends without an answer. lost answer: the request
is carried out, but its answer never arrives. half request: the connection ends while the request's body is being sent.
half body: the body ends after half of the promised bytes. short body: half of the bytes, and a Content-Length that says
that this is all. stalled body: half of the bytes, and then nothing. slow: the answer comes after some seconds.
"""

_START = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(kw_only=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    path: str = ""
    """A regular expression that the path with its query must contain; all requests by default."""
    times: int | None = 1
    """How many requests it strikes; none: every one, for ever."""
    skip: int = 0
    """How many requests it lets pass first."""
    every: int = 1
    """It strikes every so many of the requests that are left."""
    seconds: float = 30.0
    """How long a slow or stalled answer takes."""
    struck: int = 0
    """How many requests it has struck so far."""


@dataclass
class Faults:
    """What goes wrong at the server, and what was asked of it."""

    active: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and path of every request, in order of arrival."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, **how: Any) -> Fault:
        """Make something go wrong from now on."""
        assert kind in KINDS, kind
        fault = Fault(kind=kind, **how)
        with self._lock:
            self.active.append(fault)
        return fault

    def clear(self) -> None:
        """All is well again, and nothing was asked yet."""
        with self._lock:
            self.active.clear()
            self.requests.clear()

    def count(self, pattern: str) -> int:
        """How many requests, as "METHOD /path", match a regular expression."""
        with self._lock:
            return sum(re.search(pattern, request) is not None for request in self.requests)

    def strike(self, method: str, path: str) -> Fault | None:
        """The fault that strikes a request, if any."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            for fault in self.active:
                if method not in fault.methods or not re.search(fault.path, path):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.times is None or fault.struck < fault.times:
                    fault.skip = fault.every - 1
                    fault.struck += 1
                    return fault
        return None


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        self.backend = port
        self.faults = Faults()
        self.writing = threading.Lock()
        """S3 takes writes to a key in turn; moto looks whether a condition holds, and then writes, in any threads."""
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _break(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes) -> None:
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{key}: {value}" for key, value in headers)]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def _error(self, status: int, code: str) -> None:
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>as told</Message></Error>'.encode()
        if self.command == "HEAD":
            body = b""
        self._send(status, code, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)

    def _handle(self) -> None:
        fault = self.server.faults.strike(self.command, self.path)
        kind = None if fault is None else fault.kind
        if kind == "short body" and self.command == "HEAD":
            kind = None  # there is no body; and a length that is not so would be a wrong answer, not a failure
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "half request":
            self.rfile.read(length // 2)
            return self._break()
        request = self.rfile.read(length)
        if len(request) < length:
            return self._break()
        if kind == "500":
            return self._error(500, "InternalError")
        if kind == "503":
            return self._error(503, "SlowDown")
        if kind == "drop":
            return self._break()
        if fault is not None and kind == "slow":
            time.sleep(fault.seconds)
        backend = http.client.HTTPConnection("127.0.0.1", self.server.backend)
        reads = self.command in ("GET", "HEAD")
        with contextlib.nullcontext() if reads else self.server.writing:
            backend.request(self.command, self.path, request or None, dict(self.headers.items()))
            response = backend.getresponse()
            body = response.read()
        backend.close()
        if kind == "lost answer":
            return self._break()
        dropped = {"transfer-encoding", "connection", "content-length", "server", "date"}
        headers = [(key, value) for key, value in response.getheaders() if key.lower() not in dropped]
        promised = response.getheader("Content-Length") or str(len(body))
        sent = body[: len(body) // 2] if kind in ("half body", "short body", "stalled body") else body
        headers.append(("Content-Length", str(len(sent)) if kind == "short body" else promised))
        self._send(response.status, response.reason, headers, sent)
        if fault is not None and kind == "stalled body":
            self.wfile.flush()
            time.sleep(fault.seconds)
        if len(sent) < len(body) and kind != "short body":
            self._break()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """Where the server is, and what goes wrong there."""

    endpoint: str
    faults: Faults

    def new_bucket(self) -> str:
        """Make an empty bucket and give its name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            response.read()
        return name

    def environment(self, home: Path) -> dict[str, str]:
        """The variables that a process needs to use the server with little patience, its disk cache below a folder."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "TAILCACHE_RETRY_SECONDS": "5",
            "TAILCACHE_TIMEOUT_SECONDS": "5",
            "TAILCACHE_DISK_CACHE": str(home / "disk-cache"),
        }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The server; one for all tests of a session."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    with subprocess.Popen(
        [sys.executable, "-c", _START],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**environment, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        proxy = _Proxy(port)
        thread = threading.Thread(target=proxy.serve_forever, name="s3-proxy", daemon=True)
        thread.start()
        try:
            yield S3Server(endpoint=f"http://127.0.0.1:{proxy.server_address[1]}", faults=proxy.faults)
        finally:
            proxy.shutdown()
            proxy.server_close()
            thread.join()
            process.stdin.close()
            process.kill()


@pytest.fixture
def faults(s3_server: S3Server) -> Iterator[Faults]:
    """What goes wrong at the server during one test: nothing, until the test says so."""
    s3_server.faults.clear()
    yield s3_server.faults
    s3_server.faults.clear()


@pytest.fixture
def s3_url(s3_server: S3Server, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in a fresh bucket, which this process and its children can reach."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "TAILCACHE_"))]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3_server.new_bucket()}/caches/one"
    faults.clear()
    return url

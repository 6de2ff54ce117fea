"""An S3 server behind a proxy that sometimes answers 503, loses a response, or restarts."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.processes import free_port

_START_S = 60.0
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>"
# Every so many requests one is rejected, and one is executed but answered with 503.
_REFUSED, _UNANSWERED = 23, 37
_OFF_S = 2.0


class _Handler(BaseHTTPRequestHandler):
    """Forwards a request unchanged."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        fate = self.server.front.fate()
        status, headers, data = 503, [], _SLOW_DOWN
        if fate != "refused":
            status, headers, data = self._ask(body)
        if fate == "unanswered":
            status, headers, data = 503, [], _SLOW_DOWN
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.server.front.inner)) as inner:
            inner.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    inner.putheader(name, value)
            inner.endheaders(body)
            found = inner.getresponse()
            data = found.read()
            passed = [
                (name, value)
                for name, value in found.getheaders()
                if name.lower() not in ("connection", "transfer-encoding")
            ]
            return found.status, passed, data

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, front: Front, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.front = front
        self.connections: set[Any] = set()

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnected or were cut off."""


class Front:
    """The proxy that clients connect to; `done` counts the outcomes of their requests.

    Args:
        inner: The port of the server behind it, which stores the data.
    """

    def __init__(self, inner: int) -> None:
        self.inner = inner
        self.done: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._restart_at: int | None = None
        self._server = _Server(self, 0)
        self.port = int(self._server.server_address[1])
        self._serve()

    def fate(self) -> str:
        """Return the outcome of the next request."""
        with self._lock:
            self.done["asked"] += 1
            if self.done["asked"] == self._restart_at:
                threading.Thread(target=self._restart).start()
            fate = "unanswered" if self.done["asked"] % _UNANSWERED == 0 else "answered"
            fate = "refused" if self.done["asked"] % _REFUSED == 0 else fate
            self.done[fate] += 1
            return fate

    def restart_after(self, num_requests: int) -> None:
        """Close all connections after so many more requests, and accept none for a while."""
        self._restart_at = self.done["asked"] + num_requests

    def stop(self) -> None:
        """Stop listening, and close all connections."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _restart(self) -> None:
        with self.stopped(_OFF_S):
            pass
        self.done["restarted"] += 1

    @contextmanager
    def stopped(self, wait_s: float) -> Iterator[None]:
        """Accept no connection inside the context, and for so long after it."""
        self.stop()
        try:
            yield
            time.sleep(wait_s)
        finally:
            self._server = _Server(self, self.port)
            self._serve()


@contextmanager
def object_store(log: Path) -> Iterator[Front]:
    """Start a server and its proxy."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        front = Front(port)
        try:
            _wait_for_port(port, server)
            yield front
        finally:
            front.stop()
            server.kill()


def environment(port: int) -> dict[str, str]:
    """Return the environment variables that configure a client for the server."""
    return {
        "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while server.poll() is None and time.monotonic() < deadline:
        with closing(socket.socket()) as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"no S3 server: exit code {server.poll()}")

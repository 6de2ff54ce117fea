"""The HTTP client behind the SSRF guard: rejected URLs, and reasons for bad responses."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from d2i.errors import ConfigError
from d2i.fetch.http_client import BodyLimits, Limits, get
from d2i.fetch.resolver import Resolver
from d2i.fetch.result import FetchError
from d2i.fetch.ssrf_guard import allowed_hosts, check_url, is_public
from d2i.fetch.transport import DirectTransport


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.5.5", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1"),
        *("168.63.129.16", "192.0.0.192", "192.0.0.8", "192.0.0.100", "192.0.0.9", "192.88.99.1"),
        *(
            "::ffff:127.0.0.1",
            "::ffff:192.0.0.192",
            "64:ff9b::c000:c0",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::7f00:1",
            "::127.0.0.1",
            "::ffff:0:127.0.0.1",
            "fec0::1",
            "2002:7f00:1::",
            "2002:808:808::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "2001::f7f7:f7f7",
            "fe80::1%eth0",
        ),
    ],
)
def test_ssrf_guard_private_ip_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "192.0.1.1", "192.88.98.1", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_ssrf_guard_public_ip_is_public(address: str) -> None:
    assert is_public(address)


def test_allowed_hosts_are_normalized_like_urls() -> None:
    hosts = ["Mirror.Local:8080", "[0:0::1]:80", "10.0.0.1", "mirror.local.:81"]
    assert allowed_hosts(hosts) == {
        *("mirror.local:8080", "[::1]:80", "10.0.0.1:80", "10.0.0.1:443", "mirror.local:81"),
    }
    for url in ("http://MIRROR.local:8080/x", "http://[::1]/x", "https://10.0.0.1/x"):
        assert check_url(url, allowed_hosts(hosts)).netloc in allowed_hosts(hosts)


@pytest.mark.parametrize(
    "text", ["", ":80", "a:b", "a:0", "http://a:80", "a:80/x", "u@a:80", "[::1"]
)
def test_invalid_allowed_host_raises(text: str) -> None:
    with pytest.raises(ConfigError, match="--allow-host"):
        allowed_hosts([text])


class Answers(BaseHTTPRequestHandler):
    """One kind of response per path; records the requested paths."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/good":
            self._send(200, b"x" * 1000)
        elif self.path == "/loop":
            self._redirect("/loop")
        elif self.path == "/inside":
            self._redirect(f"http://localhost:{self.server.server_address[1]}/secret")
        elif self.path == "/file":
            self._redirect("file:///etc/hostname")
        elif self.path == "/bracket":
            self._redirect("//[x/y.jpg")
        elif self.path == "/gzip":
            self._send(200, b"x", ("Content-Encoding", "gzip"))
        elif self.path == "/not-gzip":
            self._send(200, b"plain text", ("Content-Encoding", "gzip"))
        elif self.path == "/packed":
            self._send_packed(b"x" * 1000)
        elif self.path == "/members":
            self._send_packed(b"x" * 600, after=gzip.compress(b"x" * 400) + b"\0" * 9)
        elif self.path == "/many-members":
            self._send_packed(b"x", after=gzip.compress(b"") * 1000)
        elif self.path == "/cut-chunks":
            self._send(200, b"500\r\nxxxx", ("Transfer-Encoding", "chunked"))
        elif self.path == "/bomb":
            self._send_packed(b"x" * 10_000_000)
        elif self.path == "/padded":
            self._send_packed(b"x" * 10, after=b"y" * 1_000_000)
        elif self.path == "/odd-peace":
            self._send(503, b"", ("Retry-After", "9" * 400), ("Content-Length", "0"))
        elif self.path == "/moved":
            self._redirect("/\u00e9.jpg".encode().decode("latin-1"))
        elif self.path == "/busy":
            self._send(429, b"", ("Retry-After", "7"), ("Content-Length", "0"))
        elif self.path == "/endless":
            self._send_endless()
        elif self.path == "/drip":
            self._send_endless_headers()
        elif self.path == "/short":
            self._send(200, b"x" * 10, ("Content-Length", "1000"))
        else:
            self._send(404, b"")

    def _send(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers or (("Content-Length", str(len(body))),):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_packed(self, body: bytes, after: bytes = b"") -> None:
        packed = gzip.compress(body) + after
        length = ("Content-Length", str(len(packed)))
        self._send(200, packed, ("Content-Encoding", "gzip"), length)

    def _redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def _send_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            return

    def _send_endless_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        with suppress(OSError):
            while not self.server.stopped.wait(0.05):  # type: ignore[attr-defined]
                self.wfile.write(b"X: y\r\n")

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("Counted", (Answers,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        running.stopped = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.stopped.set()  # type: ignore[attr-defined]
        running.shutdown()
        thread.join()


TRANSPORT = DirectTransport(Resolver("127.0.0.1:9"))  # No test here resolves a name.


def limits(timeout_s: float = 10.0, hosts: frozenset[str] = frozenset()) -> Limits:
    return Limits(timeout_s, 5.0, BodyLimits(100_000, 1000.0), "d2i test", hosts)


def fetch(server: ThreadingHTTPServer, path: str, *, allowed: bool = True) -> bytes:
    host = f"127.0.0.1:{server.server_address[1]}"
    hosts = frozenset([host]) if allowed else frozenset()
    return get(f"http://{host}{path}", limits(hosts=hosts), TRANSPORT).body


def requests_of(server: ThreadingHTTPServer) -> list[str]:
    return server.RequestHandlerClass.asked  # type: ignore[attr-defined]


def test_get_returns_body_of_allowed_host(server: ThreadingHTTPServer) -> None:
    assert fetch(server, "/good") == b"x" * 1000


@pytest.mark.parametrize("path", ["/packed", "/members"])
def test_gzip_body_is_decompressed(server: ThreadingHTTPServer, path: str) -> None:
    assert fetch(server, path) == b"x" * 1000


def test_redirect_to_unencoded_path_is_followed(server: ThreadingHTTPServer) -> None:
    with pytest.raises(FetchError):
        fetch(server, "/moved")
    assert requests_of(server) == ["/moved", "/%C3%A9.jpg"]


def test_retry_after_of_429_is_parsed(server: ThreadingHTTPServer) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(server, "/busy")
    assert caught.value.status == 429
    assert caught.value.retry_after_s == 7.0


def test_deadline_ends_dripping_headers(server: ThreadingHTTPServer) -> None:
    host = f"127.0.0.1:{server.server_address[1]}"
    with pytest.raises(FetchError) as caught:
        get(f"http://{host}/drip", limits(0.5, frozenset([host])), TRANSPORT)
    assert caught.value.reason == "timeout"


def test_url_is_sent_percent_encoded(server: ThreadingHTTPServer) -> None:
    with pytest.raises(FetchError, match="Not Found"):
        fetch(server, "/\u00fc \r\n.jpg?a=%20\u00e9")
    assert requests_of(server) == ["/%C3%BC%20.jpg?a=%20%C3%A9"]


def test_ssrf_guard_sends_no_request_to_private_host(server: ThreadingHTTPServer) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(server, "/good", allowed=False)
    assert caught.value.reason == "refused_address"
    assert requests_of(server) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nothing", "http_404"),
        ("/loop", "too_many_redirects"),
        ("/inside", "refused_address"),
        ("/file", "bad_url"),
        ("/bracket", "bad_url"),
        ("/gzip", "cut_body"),
        ("/not-gzip", "encoded_body"),
        ("/bomb", "too_many_bytes"),
        ("/padded", "too_many_bytes"),
        ("/odd-peace", "http_503"),
        ("/busy", "http_429"),
        ("/endless", "too_many_bytes"),
        ("/short", "cut_body"),
        ("/cut-chunks", "cut_body"),
        ("/many-members", "encoded_body"),
    ],
)
def test_bad_response_has_reason(server: ThreadingHTTPServer, path: str, reason: str) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(server, path)
    assert caught.value.reason == reason
    assert "/secret" not in requests_of(server)


@pytest.mark.parametrize(
    "host",
    [
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "[::1]",
        "[::ffff:7f00:1]",
        "169.254.169.254",
        "168.63.129.16",
        "\uff11\uff12\uff17\u30020.0.1",
        "\u2460\u2461\u2466\uff0e0\uff0e0\uff0e1",
    ],
)
def test_ssrf_guard_rejects_private_ip_in_every_notation(host: str) -> None:
    with pytest.raises(FetchError) as caught:
        get(f"http://{host}/", limits(), TRANSPORT)
    assert caught.value.reason == "refused_address"


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/hostname", "data:,x", "ftp://a/b", "http://", "http://[bad/x.jpg", "x"),
        *("http://a..b/x", "http://.a/x", f"http://{'a' * 64}.test/x", f"http://{'a.' * 128}b/x"),
    ],
)
def test_url_that_is_not_http_is_rejected(url: str) -> None:
    with pytest.raises(FetchError) as caught:
        get(url, limits(), TRANSPORT)
    assert caught.value.reason == "bad_url"

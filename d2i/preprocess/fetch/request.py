"""One guarded HTTP request: no private address, no endless body, no endless wait.

The host is resolved once, every address of it is checked, and the connection goes to the very
address that was checked (threats.md, section 3, row 1). Each redirect starts anew.
"""

from __future__ import annotations

import email.message
import email.utils
import http.client
import socket
import ssl
import string
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import quote, urljoin

from d2i.preprocess.fetch.guard import PORTS, Target, check_addresses, check_url
from d2i.preprocess.fetch.reasons import RefusedRequestError
from d2i.preprocess.fetch.resolver import Resolver

_REDIRECTS = (301, 302, 303, 307, 308)
_NUM_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_GRACE_S = 5.0
"""How long a connection may be slower than the minimum rate, in seconds (ours)."""
# What a path or a query may hold as it is; '%' too, as addresses come percent-encoded already.
_PLAIN = "/%:@!$&'()*+,;=~-._?"
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


@dataclass(frozen=True)
class Response:
    """A complete body, as it is after decompression, and where it came from."""

    body: bytes
    status: int
    final_url: str
    headers: email.message.Message


@dataclass(frozen=True)
class Limits:
    """What one address may cost, and who asks.

    Args:
        timeout_s: Total deadline, redirects and body included.
        connect_timeout_s: How long a host may take to resolve, and to take a connection.
        min_rate_bytes_s: Bodies that come more slowly, after a few seconds, are given up.
        max_bytes: Longest body, also after decompression.
        user_agent: Names d2i and whom to write to.
        allow_hosts: `HOST:PORT` that may be asked although private.
    """

    timeout_s: float
    connect_timeout_s: float
    min_rate_bytes_s: float
    max_bytes: int
    user_agent: str
    allow_hosts: frozenset[str] = frozenset()


def get(
    url: str,
    limits: Limits,
    resolver: Resolver,
    on_target: Callable[[Target], None] = lambda _: None,
) -> Response:
    """Fetch one address, following at most five redirects.

    Args:
        url: The address.
        limits: What it may cost.
        resolver: Finds its host.
        on_target: Called with each place before it is asked, redirects included; it may wait, and
            it may raise `RefusedRequestError`.

    Raises:
        RefusedRequestError: With reason `refused_address`, `bad_url`, `no_such_host`,
            `dns_failed`, `connect`, `tls`, `timeout`, `too_slow`, `http_<status>`,
            `too_many_bytes`, `encoded_body` or `too_many_redirects`.
    """
    deadline = time.monotonic() + limits.timeout_s
    for _ in range(_NUM_REDIRECTS + 1):
        target = check_url(url, limits.allow_hosts)
        before = time.monotonic()
        on_target(target)
        # Waiting for a turn is our courtesy, not the host's slowness.
        deadline += time.monotonic() - before
        progress = _Progress()
        try:
            answer = _get_once(url, target, limits, resolver, deadline, progress)
        except (RefusedRequestError, OSError, http.client.HTTPException, ValueError) as err:
            refused = _refused(err, deadline, limits)
            refused.final_url, refused.was_reached = url, progress.has_answer
            raise refused from err
        if isinstance(answer, Response):
            return answer
        url = answer
    raise RefusedRequestError("too_many_redirects", f"over {_NUM_REDIRECTS}", final_url=url)


@dataclass
class _Progress:
    """How far one request got."""

    has_answer: bool = False


def _refused(err: Exception, deadline: float, limits: Limits) -> RefusedRequestError:
    if isinstance(err, RefusedRequestError):
        return err
    if isinstance(err, TimeoutError):
        return RefusedRequestError("timeout", f"over {limits.timeout_s} s")
    return RefusedRequestError(_reason(err, deadline), str(err))


def _reason(err: Exception, deadline: float) -> str:
    if time.monotonic() >= deadline:
        # Ended at the deadline, a connection looks as if the other side had closed it.
        return "timeout"
    if isinstance(err, ssl.SSLError):
        return "tls"
    if isinstance(err, http.client.InvalidURL):
        return "bad_url"
    return "connect" if isinstance(err, OSError | http.client.HTTPException) else "bad_url"


def _get_once(
    url: str,
    target: Target,
    limits: Limits,
    resolver: Resolver,
    deadline: float,
    progress: _Progress,
) -> Response | str:
    """Return the response, or the address it redirects to."""
    connect_deadline = min(deadline, time.monotonic() + limits.connect_timeout_s)
    addresses = resolver.addresses(target.host, _left(connect_deadline))
    check_addresses(target, addresses, limits.allow_hosts)
    with (
        closing(_connect(target, addresses[0], connect_deadline)) as connection,
        _ended_at(deadline, connection.sock),
    ):
        connection.sock.settimeout(_left(deadline))
        if isinstance(connection.sock, ssl.SSLSocket):
            connection.sock.do_handshake()
        connection.request("GET", quote(target.path, safe=_PLAIN), headers=_headers(limits))
        with closing(connection.getresponse()) as answer:
            progress.has_answer = True
            location = answer.getheader("Location")
            if answer.status in _REDIRECTS and location:
                # Headers are read as latin-1; most hosts mean UTF-8, and urllib does the same.
                return urljoin(url, quote(location, safe=string.punctuation, encoding="latin-1"))
            if answer.status != 200:
                raise RefusedRequestError(
                    f"http_{answer.status}",
                    answer.reason,
                    answer.status,
                    _retry_after_s(answer.getheader("Retry-After")),
                )
            body = _read_body(connection, answer, limits, deadline)
            return Response(body, answer.status, url, answer.headers)


def _headers(limits: Limits) -> dict[str, str]:
    return {
        "User-Agent": limits.user_agent,
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def _retry_after_s(value: str | None) -> float | None:
    """Read seconds or a date."""
    if value is None:
        return None
    with suppress(ValueError, OverflowError):
        return max(float(int(value)), 0.0)
    with suppress(ValueError, TypeError, OverflowError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None


def _connect(target: Target, address: str, deadline: float) -> http.client.HTTPConnection:
    raw = socket.create_connection((address, target.port), timeout=_left(deadline))
    connection = http.client.HTTPConnection(target.host, target.port)
    # So that the Host header names no port where it is that of the scheme.
    connection.default_port = PORTS[target.scheme]
    connection.sock = raw
    if target.scheme == "https":
        connection.sock = ssl.create_default_context().wrap_socket(
            raw, server_hostname=target.host, do_handshake_on_connect=False
        )
    return connection


@contextmanager
def _ended_at(deadline: float, connected: socket.socket) -> Iterator[None]:
    """Shut the connection down at the deadline, however slowly anything drips in until then."""
    timer = threading.Timer(_left(deadline), _shut_down, args=(connected,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):
        # The plain socket's own: that of a TLS socket takes its state away from the reader.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _read_body(
    connection: http.client.HTTPConnection,
    answer: http.client.HTTPResponse,
    limits: Limits,
    deadline: float,
) -> bytes:
    # One receive at a time, each with what is left of the deadline: a drip cannot outlast it.
    body = _Body(limits, answer.getheader("Content-Encoding", "identity"))
    started, num_received = time.monotonic(), 0
    while True:
        if connection.sock is not None:
            connection.sock.settimeout(_left(deadline))
        chunk = answer.read1(_CHUNK_BYTES)
        _left(deadline)
        if not chunk:
            break
        num_received += len(chunk)
        if num_received > limits.max_bytes:
            raise RefusedRequestError("too_many_bytes", f"over {limits.max_bytes} bytes")
        elapsed_s = time.monotonic() - started
        if elapsed_s > _GRACE_S and num_received < limits.min_rate_bytes_s * elapsed_s:
            raise RefusedRequestError("too_slow", f"{num_received} bytes in {elapsed_s:.0f} s")
        body.add(chunk)
    if answer.length:
        raise RefusedRequestError("connect", f"the body ended {answer.length} bytes early")
    return body.whole()


class _Body:
    """A body under way, decompressed as it comes, never longer than the limit."""

    def __init__(self, limits: Limits, encoding: str) -> None:
        name = encoding.strip().lower()
        if name not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise RefusedRequestError("encoded_body", f"got encoding {encoding!r}, asked for none")
        self._max_bytes = limits.max_bytes
        self._inflate = None if name in ("identity", "") else zlib.decompressobj(_GZIP_OR_ZLIB)
        self._data = bytearray()

    def add(self, chunk: bytes) -> None:
        """Append what was received."""
        if self._inflate is not None:
            try:
                # One byte more than there is room for shows that there is more.
                chunk = self._inflate.decompress(chunk, self._max_bytes - len(self._data) + 1)
            except zlib.error as err:
                raise RefusedRequestError("encoded_body", str(err)) from err
        self._data += chunk
        if len(self._data) > self._max_bytes:
            raise RefusedRequestError("too_many_bytes", f"over {self._max_bytes} bytes")

    def whole(self) -> bytes:
        """Return the body, which must be complete."""
        if self._inflate is not None and not self._inflate.eof:
            raise RefusedRequestError("encoded_body", "the compressed body ended early")
        return bytes(self._data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left

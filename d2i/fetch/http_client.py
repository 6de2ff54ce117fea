"""Guarded HTTP requests: no private IP address, no endless body, no endless wait.

The host is resolved once, all its IP addresses are checked (SSRF), and the connection goes to one
that was checked; a proxy does the same itself. Each redirect starts over. A body is never longer
than its limit, and never slower than its minimum rate.
"""

from __future__ import annotations

import email.message
import email.utils
import http.client
import ssl
import string
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import quote, urljoin

from d2i.fetch.deadlines import DEADLINES
from d2i.fetch.result import FetchError
from d2i.fetch.ssrf_guard import Target, check_url
from d2i.fetch.transport import Transport, connect, time_left

_CHUNK_BYTES = 1 << 16
_GRACE_S = 5.0
"""Seconds before the minimum rate of a body is enforced (our default)."""
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_GZIP = b"\x1f\x8b"
_NUM_MEMBERS = 100
"""Most gzip members in a body (our default); thousands of empty ones are an attack."""


@dataclass(frozen=True)
class BodyLimits:
    """Limits of a response body.

    Args:
        max_bytes: Greatest length, also after decompression.
        min_rate_bytes_s: Slower bodies are given up after a few seconds.
    """

    max_bytes: int
    min_rate_bytes_s: float


def read_body(
    answer: http.client.HTTPResponse, limits: BodyLimits, before_each: Callable[[], None]
) -> bytes:
    """Read a body to its end, and decompress it.

    Args:
        answer: Response whose headers were read.
        limits: Limits of the body.
        before_each: Called before each receive; may raise.

    Raises:
        FetchError: `too_many_bytes`, `too_slow`, `encoded_body` or `cut_body`.
        OSError, http.client.HTTPException: As raised by the connection.
    """
    body = _Body(limits.max_bytes, answer.getheader("Content-Encoding", "identity"))
    started, num_received = time.monotonic(), 0
    while True:
        before_each()
        chunk = answer.read1(_CHUNK_BYTES)
        if not chunk:
            break
        num_received += len(chunk)
        if num_received > limits.max_bytes:
            raise FetchError("too_many_bytes", f"over {limits.max_bytes} bytes")
        elapsed_s = time.monotonic() - started
        if elapsed_s > _GRACE_S and num_received < limits.min_rate_bytes_s * elapsed_s:
            raise FetchError("too_slow", f"{num_received} bytes in {elapsed_s:.0f} s")
        body.add(chunk)
    # A connection closed at its deadline looks as if the body had ended.
    before_each()
    if answer.length:
        raise FetchError("cut_body", f"the body ended {answer.length} bytes early")
    return body.whole()


class _Body:
    """Body so far: decompressed as it arrives, never longer than the limit."""

    def __init__(self, max_bytes: int, encoding: str) -> None:
        name = encoding.strip().lower()
        if name not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise FetchError("encoded_body", f"got Content-Encoding {encoding!r}, requested none")
        self._max_bytes = max_bytes
        self._is_packed = name not in ("identity", "")
        self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
        self._num_members = 1
        self._after_member = b""
        self._data = bytearray()

    def add(self, chunk: bytes) -> None:
        """Append a received chunk."""
        if self._is_packed:
            self._add_packed(chunk)
        else:
            self._append(chunk)

    def whole(self) -> bytes:
        """Return the body, which must be complete."""
        if self._is_packed and not self._inflate.eof:
            raise FetchError("cut_body", "the compressed body ended early")
        return bytes(self._data)

    def _add_packed(self, chunk: bytes) -> None:
        try:
            while chunk:
                if self._inflate.eof and not (chunk := self._next_member(chunk)):
                    return
                # One byte over the room that is left shows that the body is too long.
                room = self._max_bytes - len(self._data) + 1
                self._append(self._inflate.decompress(chunk, room))
                chunk = self._inflate.unused_data
        except zlib.error as err:
            raise FetchError("encoded_body", str(err)) from err

    def _next_member(self, chunk: bytes) -> bytes:
        """Start the gzip member after a finished one; trailing bytes that are none are ignored."""
        begun = (self._after_member + chunk)[: len(_GZIP)]
        if begun != _GZIP:
            # One byte is too few to recognize a gzip member.
            self._after_member = begun if len(begun) < len(_GZIP) else b"\0"
            return b""
        self._num_members += 1
        if self._num_members > _NUM_MEMBERS:
            raise FetchError("encoded_body", f"over {_NUM_MEMBERS} gzip members")
        whole, self._after_member = self._after_member + chunk, b""
        self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
        return whole

    def _append(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > self._max_bytes:
            raise FetchError("too_many_bytes", f"over {self._max_bytes} bytes")


_REDIRECTS = (301, 302, 303, 307, 308)
_NUM_REDIRECTS = 5


@dataclass(frozen=True)
class Response:
    """Complete decompressed body, with its status, headers and final URL."""

    body: bytes
    status: int
    final_url: str
    headers: email.message.Message


@dataclass(frozen=True)
class Limits:
    """Limits of one URL, and the User-Agent.

    Args:
        timeout_s: Total deadline, redirects and body included.
        connect_timeout_s: Time limit to resolve a host and connect to it.
        body: Limits of the body.
        user_agent: Names d2i and a contact.
        allow_hosts: `HOST:PORT` of private hosts that may be requested
            (`ssrf_guard.allowed_hosts`).
    """

    timeout_s: float
    connect_timeout_s: float
    body: BodyLimits
    user_agent: str
    allow_hosts: frozenset[str] = frozenset()


def get(
    url: str,
    limits: Limits,
    route: Transport,
    on_target: Callable[[Target], None] = lambda _: None,
) -> Response:
    """Fetch one URL, following at most five redirects.

    Args:
        url: The URL.
        limits: Time and size limits.
        route: Transport to the hosts.
        on_target: Called with each target before its request, redirects included; it may wait, and
            it may raise `FetchError`.

    Raises:
        FetchError: With reason `refused_address`, `bad_url`, `no_such_host`, `dns_failed`,
            `connect`, `proxy_unreached`, `proxy_refused`, `tls`, `timeout`, `too_slow`,
            `http_<status>`, `too_many_bytes`, `encoded_body`, `cut_body` or `too_many_redirects`.
    """
    deadline = time.monotonic() + limits.timeout_s
    for hop in range(_NUM_REDIRECTS + 1):
        with _refusing_before_request(url, is_sent_on=hop > 0):
            target = check_url(url, limits.allow_hosts)
            before = time.monotonic()
            on_target(target)
        # Waiting for the rate limiter does not count against the host.
        deadline += time.monotonic() - before
        progress = _Progress()
        try:
            answer = _get_once(url, target, limits, route, deadline, progress)
        except (FetchError, OSError, http.client.HTTPException, ValueError) as err:
            refused = _refused(err, deadline, limits, progress)
            refused.final_url, refused.was_reached = url, progress.has_answer
            raise refused from err
        if isinstance(answer, Response):
            return answer
        url = answer
    raise FetchError("too_many_redirects", f"over {_NUM_REDIRECTS} redirects", final_url=url)


@contextmanager
def _refusing_before_request(url: str, *, is_sent_on: bool) -> Iterator[None]:
    """Add the refused URL to an error; a host that redirected to it was reached."""
    try:
        yield
    except FetchError as err:
        err.final_url, err.was_reached = url, is_sent_on
        raise


@dataclass
class _Progress:
    """Progress of one request."""

    has_answer: bool = False


def _refused(err: Exception, deadline: float, limits: Limits, progress: _Progress) -> FetchError:
    if isinstance(err, FetchError):
        return err
    if isinstance(err, TimeoutError):
        return FetchError("timeout", f"over {limits.timeout_s} s")
    return FetchError(_reason(err, deadline, progress), str(err))


def _reason(err: Exception, deadline: float, progress: _Progress) -> str:
    if time.monotonic() >= deadline:
        # A connection closed at the deadline looks as if the other side had closed it.
        return "timeout"
    if progress.has_answer and isinstance(err, OSError | http.client.HTTPException):
        return "cut_body"
    if isinstance(err, ssl.SSLError):
        return "tls"
    if isinstance(err, http.client.InvalidURL):
        return "bad_url"
    return "connect" if isinstance(err, OSError | http.client.HTTPException) else "bad_url"


def _get_once(
    url: str,
    target: Target,
    limits: Limits,
    route: Transport,
    deadline: float,
    progress: _Progress,
) -> Response | str:
    """Return the response, or the URL it redirects to."""
    connect_deadline = min(deadline, time.monotonic() + limits.connect_timeout_s)
    with (
        closing(connect(route, target, limits.allow_hosts, connect_deadline)) as connection,
        DEADLINES.deadline(connection.sock, deadline),
    ):
        connection.sock.settimeout(time_left(deadline))
        if isinstance(connection.sock, ssl.SSLSocket):
            connection.sock.do_handshake()
        headers = _headers(limits) | route.headers(target)
        connection.request("GET", route.address_line(target), headers=headers)
        with closing(connection.getresponse()) as answer:
            route.check_answer(target, answer)
            progress.has_answer = True
            location = answer.getheader("Location")
            if answer.status in _REDIRECTS and location:
                # http.client decodes headers as latin-1. Quoting keeps the raw bytes, mostly UTF-8,
                # as urllib does.
                return urljoin(url, quote(location, safe=string.punctuation, encoding="latin-1"))
            if answer.status != http.client.OK:
                raise FetchError(
                    f"http_{answer.status}",
                    answer.reason,
                    answer.status,
                    _parse_retry_after(answer.getheader("Retry-After")),
                )
            # One receive at a time, none after the deadline, so a slow drip cannot outlast it.
            body = read_body(answer, limits.body, lambda: _check_time(deadline))
            return Response(body, answer.status, url, answer.headers)


def _check_time(deadline: float) -> None:
    time_left(deadline)


def _headers(limits: Limits) -> dict[str, str]:
    return {
        "User-Agent": limits.user_agent,
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def _parse_retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None if it is neither."""
    if value is None:
        return None
    with suppress(ValueError, OverflowError):
        return max(float(int(value)), 0.0)
    with suppress(ValueError, TypeError, OverflowError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None

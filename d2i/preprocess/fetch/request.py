"""One guarded HTTP request: no private address, no endless body, no endless wait.

The host is resolved once, every address of it is checked, and the connection goes to the very
address that was checked (threats.md, section 3, row 1). Each redirect starts anew.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from d2i import __version__

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_NUM_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
# What a path or a query may hold as it is; '%' too, as addresses come percent-encoded already.
_PLAIN = "/%:@!$&'()*+,;=~-._?"
_USER_AGENT = f"d2i/{__version__} (dialog-to-image research)"


class RefusedRequestError(Exception):
    """The request failed; `reason` is its class in the ledger."""

    def __init__(self, reason: str, detail: str, status: int | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.status = status


@dataclass(frozen=True)
class Response:
    """A complete body, and where it came from."""

    body: bytes
    status: int
    final_url: str


@dataclass(frozen=True)
class Limits:
    """What one address may cost.

    Args:
        timeout_s: Total deadline, redirects and body included.
        max_bytes: Longest body.
        allow_hosts: `host:port` that may be asked although private.
    """

    timeout_s: float
    max_bytes: int
    allow_hosts: frozenset[str] = frozenset()


def get(url: str, limits: Limits) -> Response:
    """Fetch one address, following at most five redirects.

    Raises:
        RefusedRequestError: With reason `refused_address`, `bad_url`, `dns`, `connect`, `tls`,
            `timeout`, `http_<status>`, `too_many_bytes`, `encoded_body` or `too_many_redirects`.
    """
    deadline = time.monotonic() + limits.timeout_s
    for _ in range(_NUM_REDIRECTS + 1):
        try:
            answer = _get_once(url, limits, deadline)
        except TimeoutError as err:
            raise RefusedRequestError("timeout", f"over {limits.timeout_s} s") from err
        except ssl.SSLError as err:
            reason = "tls" if time.monotonic() < deadline else "timeout"
            raise RefusedRequestError(reason, str(err)) from err
        except (OSError, http.client.HTTPException) as err:
            # Ended at the deadline, a connection looks as if the other side had closed it.
            reason = "connect" if time.monotonic() < deadline else "timeout"
            raise RefusedRequestError(reason, str(err)) from err
        except ValueError as err:
            raise RefusedRequestError("bad_url", str(err)) from err
        if isinstance(answer, Response):
            return answer
        url = answer
    raise RefusedRequestError("too_many_redirects", f"over {_NUM_REDIRECTS}")


def _get_once(url: str, limits: Limits, deadline: float) -> Response | str:
    """Return the response, or the address it redirects to."""
    parts = _checked_parts(url)
    port = parts.port or _PORTS[parts.scheme]
    host = str(parts.hostname)
    address = _checked_address(host, port, limits.allow_hosts, parts.scheme)
    secure = parts.scheme == "https"
    with (
        closing(_connect(host, port, address, secure=secure, deadline=deadline)) as connection,
        _ended_at(deadline, connection.sock),
    ):
        if isinstance(connection.sock, ssl.SSLSocket):
            connection.sock.do_handshake()
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = quote(target, safe=_PLAIN)
        headers = {"User-Agent": _USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers)
        with closing(connection.getresponse()) as answer:
            if answer.status in _REDIRECTS and answer.getheader("Location"):
                return urljoin(url, str(answer.getheader("Location")))
            if answer.status != 200:
                raise RefusedRequestError(f"http_{answer.status}", answer.reason, answer.status)
            if answer.getheader("Content-Encoding", "identity") != "identity":
                raise RefusedRequestError("encoded_body", "a compressed body was not asked for")
            body = _read_body(connection, answer, limits, deadline)
            return Response(body, answer.status, url)


def _checked_parts(url: str) -> SplitResult:
    parts = urlsplit(url)
    port_is_valid = parts.port is None or parts.port > 0
    if parts.scheme not in _PORTS or not parts.hostname or not port_is_valid:
        raise RefusedRequestError("bad_url", "expected an http or https address with a host")
    return parts


def _checked_address(host: str, port: int, allow_hosts: frozenset[str], scheme: str) -> str:
    """Resolve once and return the address to connect to, if every one of them may be asked."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:
        raise RefusedRequestError("dns", str(err)) from err
    addresses = [str(info[4][0]) for info in found]
    if f"{host}:{port}" in allow_hosts:
        return addresses[0]
    if port != _PORTS[scheme]:
        raise RefusedRequestError("refused_address", f"port {port} is not {_PORTS[scheme]}")
    for address in addresses:
        if not is_public(address):
            raise RefusedRequestError("refused_address", f"{host} is at {address}")
    return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet, seen through IPv4-in-IPv6 forms."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast


def _connect(
    host: str, port: int, address: str, *, secure: bool, deadline: float
) -> http.client.HTTPConnection:
    raw = socket.create_connection((address, port), timeout=_left(deadline))
    connection = http.client.HTTPConnection(host, port)
    connection.sock = raw
    if secure:
        connection.sock = ssl.create_default_context().wrap_socket(
            raw, server_hostname=host, do_handshake_on_connect=False
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
    chunks, size = [], 0
    while True:
        if connection.sock is not None:
            connection.sock.settimeout(_left(deadline))
        chunk = answer.read1(_CHUNK_BYTES)
        _left(deadline)
        if not chunk:
            break
        size += len(chunk)
        if size > limits.max_bytes:
            raise RefusedRequestError("too_many_bytes", f"over {limits.max_bytes} bytes")
        chunks.append(chunk)
    body = b"".join(chunks)
    if answer.length:
        raise RefusedRequestError("connect", f"the body ended {answer.length} bytes early")
    return body


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left

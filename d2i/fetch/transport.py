"""Transport of a request: straight to the IP address that was checked, or through a proxy.

A proxy resolves hosts itself, and may refuse them (Smokescreen).
"""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from d2i.errors import ConfigError
from d2i.fetch.deadlines import DEADLINES
from d2i.fetch.resolver import Resolver, literal_address
from d2i.fetch.result import FetchError
from d2i.fetch.ssrf_guard import PORTS, Target, check_addresses

_DENIED_HEADERS = ("X-Smokescreen-Error", "X-Squid-Error")
"""Headers that a proxy adds to its own answers, so that they are not mistaken for the host's."""
_NEEDS_PROXY_LOGIN = 407  # Smokescreen also sends it for hosts that its rules forbid.
_FORBIDDEN = 403
_TRANSIENT_STATUS = 500


@dataclass(frozen=True)
class Proxy:
    """Host and port of a proxy, and its credentials, which are never shown."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)

    def headers(self) -> dict[str, str]:
        """Return the headers that are for the proxy alone."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}

    def address_line(self, target: Target) -> str:
        """Return the request target of a plain http request through the proxy: the whole URL."""
        return f"{target.scheme}://{target.authority}{target.path}"

    def tunnel(self, connection: socket.socket, target: Target) -> None:
        """Open a tunnel through the proxy to a target (CONNECT).

        Raises:
            FetchError: `proxy_refused`, or `connect` if the proxy did not reach the target.
            OSError, http.client.HTTPException: As raised by the connection.
        """
        netloc = target.netloc.encode("idna").decode("ascii")
        lines = [f"CONNECT {netloc} HTTP/1.1", f"Host: {netloc}"]
        lines += [f"{name}: {value}" for name, value in self.headers().items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        with closing(http.client.HTTPResponse(connection, method="CONNECT")) as answer:
            answer.begin()
            answer_line = f"the proxy answered {answer.status} {answer.reason}"
            if answer.status >= _TRANSIENT_STATUS:
                raise FetchError("connect", answer_line)
            if answer.status != http.client.OK:
                raise FetchError("proxy_refused", answer_line)

    def check_answer(self, answer: http.client.HTTPResponse) -> None:
        """Raise if the answer to a plain http request is the proxy's own refusal, not the target's.

        Raises:
            FetchError: `proxy_refused`.
        """
        is_its_own = any(name in answer.headers for name in _DENIED_HEADERS)
        if answer.status == _NEEDS_PROXY_LOGIN or (answer.status == _FORBIDDEN and is_its_own):
            raise FetchError("proxy_refused", f"the proxy answered {answer.status} {answer.reason}")


def parse_proxy(text: str) -> Proxy:
    """Parse `http://[USER:PASSWORD@]HOST:PORT`.

    Raises:
        ConfigError: If it has another form; the message shows neither user nor password.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme != "http" or parts.path.strip("/"):
        shown = text.rpartition("@")[2]
        raise ConfigError(
            f"--proxy {shown}: expected http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT; "
            "https:// proxies are not supported"
        )
    return Proxy(host, port, _authorization(parts))


def _authorization(parts: SplitResult) -> str | None:
    if parts.username is None:
        return None
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(login.encode()).decode("ascii")


_NUM_ADDRESSES = 4
"""IP addresses of one host that are tried, each with its share of the time to connect (our
default)."""


class Transport(Protocol):
    """Way to reach a target."""

    def open(self, target: Target, allow_hosts: frozenset[str], deadline: float) -> socket.socket:
        """Return a connection to the target, before any TLS handshake.

        Raises:
            FetchError: If the target may not or cannot be reached.
            OSError, http.client.HTTPException: As raised by the connection.
        """
        ...

    def address_line(self, target: Target) -> str:
        """Return the request target for that connection: a path or a whole URL."""
        ...

    def headers(self, target: Target) -> dict[str, str]:
        """Return the headers that only this transport needs."""
        ...

    def check_answer(self, target: Target, answer: http.client.HTTPResponse) -> None:
        """Raise `FetchError` for an answer that is not the target's."""
        ...


@dataclass(frozen=True)
class DirectTransport:
    """Direct connection: the host is resolved once, all IP addresses are checked, one is used."""

    resolver: Resolver

    def open(self, target: Target, allow_hosts: frozenset[str], deadline: float) -> socket.socket:
        """Connect to the first IP address that takes a connection."""
        addresses = self.resolver.addresses(target.host, time_left(deadline))
        check_addresses(target, addresses, allow_hosts)
        return _open_first(addresses[:_NUM_ADDRESSES], target.port, deadline)

    def address_line(self, target: Target) -> str:
        """Return the path."""
        return target.path

    def headers(self, target: Target) -> dict[str, str]:  # noqa: ARG002
        """Return no headers."""
        return {}

    def check_answer(self, target: Target, answer: http.client.HTTPResponse) -> None:
        """Do nothing: every answer is the target's."""


@dataclass(frozen=True)
class ProxyTransport:
    """Connection through a proxy, which resolves and checks names; d2i checks IP literals too."""

    proxy: Proxy

    def open(self, target: Target, allow_hosts: frozenset[str], deadline: float) -> socket.socket:
        """Connect to the proxy, and through it for https."""
        if (literal := literal_address(target.host)) is not None:
            check_addresses(target, [literal], allow_hosts)
        place = (self.proxy.host, self.proxy.port)
        try:
            connection = socket.create_connection(place, timeout=time_left(deadline))
        except OSError as err:
            raise FetchError("proxy_unreached", f"cannot connect to the proxy: {err}") from err
        if target.scheme == "https":
            try:
                with DEADLINES.deadline(connection, deadline):
                    connection.settimeout(time_left(deadline))
                    self.proxy.tunnel(connection, target)
            except BaseException:
                connection.close()
                raise
        return connection

    def address_line(self, target: Target) -> str:
        """Return the whole URL for http, the path for https."""
        return self.proxy.address_line(target) if target.scheme == "http" else target.path

    def headers(self, target: Target) -> dict[str, str]:
        """Return the proxy's headers for http; for https they go into the tunnel's request."""
        return self.proxy.headers() if target.scheme == "http" else {}

    def check_answer(self, target: Target, answer: http.client.HTTPResponse) -> None:
        """Raise if the proxy itself answered; over https every answer is the target's."""
        if target.scheme == "http":
            self.proxy.check_answer(answer)


def connect(
    route: Transport, target: Target, allow_hosts: frozenset[str], deadline: float
) -> http.client.HTTPConnection:
    """Return a connection to a target; the TLS handshake is still to be made.

    Raises:
        FetchError: If the target may not or cannot be reached.
        OSError, http.client.HTTPException: As raised by the connection.
    """
    connection = http.client.HTTPConnection(target.host, target.port)
    # So that the Host header leaves out the default port of the scheme.
    connection.default_port = PORTS[target.scheme]
    connection.sock = route.open(target, allow_hosts, deadline)
    if target.scheme == "https":
        try:
            connection.sock = _tls().wrap_socket(
                connection.sock, server_hostname=target.host, do_handshake_on_connect=False
            )
        except BaseException:
            connection.close()
            raise
    return connection


def time_left(deadline: float) -> float:
    """Return the seconds to a deadline on the monotonic clock.

    Raises:
        TimeoutError: If it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@cache
def _tls() -> ssl.SSLContext:
    """Return the one TLS context of this process: loading the certificate authorities is slow."""
    return ssl.create_default_context()


def _open_first(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first IP address that takes a connection."""
    failure: OSError = TimeoutError()
    for number, address in enumerate(addresses):
        share_s = time_left(deadline) / (len(addresses) - number)
        try:
            return socket.create_connection((address, port), timeout=share_s)
        except OSError as err:
            failure = err
    raise failure

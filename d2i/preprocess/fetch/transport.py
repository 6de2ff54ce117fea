"""The transport of a request: straight to the IP address that was checked, or through a proxy.

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
from d2i.preprocess.fetch.deadlines import DEADLINES
from d2i.preprocess.fetch.resolver import Resolver, literal_address
from d2i.preprocess.fetch.result import FetchError
from d2i.preprocess.fetch.ssrf_guard import PORTS, Target, check_addresses

_DENIED_HEADERS = ("X-Smokescreen-Error", "X-Squid-Error")
"""What proxies add to an answer of their own, so that it is not taken for the host's."""
_NEEDS_PROXY_LOGIN = 407  # Smokescreen says so for what its rules forbid, too.
_FORBIDDEN = 403
_TRANSIENT_STATUS = 500


@dataclass(frozen=True)
class Proxy:
    """A proxy's place, and what it is told to let us pass; that is never shown."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)

    def headers(self) -> dict[str, str]:
        """Return what only the proxy is told."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}

    def address_line(self, target: Target) -> str:
        """Return how a proxy is asked for a plain http target."""
        return f"{target.scheme}://{target.authority}{target.path}"

    def tunnel(self, connection: socket.socket, target: Target) -> None:
        """Make the proxy connect to a target and pass bytes on from here on.

        Raises:
            FetchError: `proxy_refused`, or `connect` where it did not reach the target.
            OSError, http.client.HTTPException: What the connection raised.
        """
        netloc = target.netloc.encode("idna").decode("ascii")
        lines = [f"CONNECT {netloc} HTTP/1.1", f"Host: {netloc}"]
        lines += [f"{name}: {value}" for name, value in self.headers().items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        with closing(http.client.HTTPResponse(connection, method="CONNECT")) as answer:
            answer.begin()
            said = f"the proxy answered {answer.status} {answer.reason}"
            if answer.status >= _TRANSIENT_STATUS:
                raise FetchError("connect", said)
            if answer.status != http.client.OK:
                raise FetchError("proxy_refused", said)

    def check_answer(self, answer: http.client.HTTPResponse) -> None:
        """Tell the proxy's own refusal of a plain http target from what the target answered.

        Raises:
            FetchError: `proxy_refused`.
        """
        is_its_own = any(name in answer.headers for name in _DENIED_HEADERS)
        if answer.status == _NEEDS_PROXY_LOGIN or (answer.status == _FORBIDDEN and is_its_own):
            raise FetchError("proxy_refused", f"the proxy answered {answer.status} {answer.reason}")


def parse_proxy(text: str) -> Proxy:
    """Read `http://[USER:PASSWORD@]HOST:PORT`.

    Raises:
        ConfigError: If it is none; the message shows neither user nor password.
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
            "a proxy that is itself reached by https cannot be used"
        )
    return Proxy(host, port, _authorization(parts))


def _authorization(parts: SplitResult) -> str | None:
    if parts.username is None:
        return None
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(login.encode()).decode("ascii")


_NUM_ADDRESSES = 4
"""Addresses of one host that are tried, each with its share of the time to connect (ours)."""


class Transport(Protocol):
    """A way to a target."""

    def open(self, target: Target, allow_hosts: frozenset[str], deadline: float) -> socket.socket:
        """Return a connection that reaches the target; TLS is still to be spoken.

        Raises:
            FetchError: Why it may or can not be reached.
            OSError, http.client.HTTPException: What the connection raised.
        """
        ...

    def address_line(self, target: Target) -> str:
        """Return what is asked for over that connection."""
        ...

    def headers(self, target: Target) -> dict[str, str]:
        """Return what this route alone needs said."""
        ...

    def check_answer(self, target: Target, answer: http.client.HTTPResponse) -> None:
        """Raise `FetchError` for an answer that is not the target's."""
        ...


@dataclass(frozen=True)
class DirectTransport:
    """To the host itself: resolved once, every address of it checked, then one of them asked."""

    resolver: Resolver

    def open(self, target: Target, allow_hosts: frozenset[str], deadline: float) -> socket.socket:
        """Connect to the first address that takes a connection."""
        addresses = self.resolver.addresses(target.host, time_left(deadline))
        check_addresses(target, addresses, allow_hosts)
        return _open_first(addresses[:_NUM_ADDRESSES], target.port, deadline)

    def address_line(self, target: Target) -> str:
        """Return the path."""
        return target.path

    def headers(self, target: Target) -> dict[str, str]:  # noqa: ARG002
        """Return nothing."""
        return {}

    def check_answer(self, target: Target, answer: http.client.HTTPResponse) -> None:
        """Do nothing: nobody else answers here."""


@dataclass(frozen=True)
class ProxyTransport:
    """Through a proxy, which resolves names and checks where they lead; literals we check too."""

    proxy: Proxy

    def open(self, target: Target, allow_hosts: frozenset[str], deadline: float) -> socket.socket:
        """Connect to the proxy, and through it for https."""
        if (literal := literal_address(target.host)) is not None:
            check_addresses(target, [literal], allow_hosts)
        place = (self.proxy.host, self.proxy.port)
        try:
            connection = socket.create_connection(place, timeout=time_left(deadline))
        except OSError as err:
            raise FetchError("proxy_unreached", f"the proxy: {err}") from err
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
        """Return the whole address for http, the path for https."""
        return self.proxy.address_line(target) if target.scheme == "http" else target.path

    def headers(self, target: Target) -> dict[str, str]:
        """Return the proxy's, where it reads them."""
        return self.proxy.headers() if target.scheme == "http" else {}

    def check_answer(self, target: Target, answer: http.client.HTTPResponse) -> None:
        """Tell the proxy's own answers from the target's, which over https are the target's."""
        if target.scheme == "http":
            self.proxy.check_answer(answer)


def connect(
    route: Transport, target: Target, allow_hosts: frozenset[str], deadline: float
) -> http.client.HTTPConnection:
    """Return a connection to ask a target over; the TLS handshake is still to be made.

    Raises:
        FetchError: Why it may or can not be reached.
        OSError, http.client.HTTPException: What the connection raised.
    """
    connection = http.client.HTTPConnection(target.host, target.port)
    # So that the Host header names no port where it is that of the scheme.
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
        TimeoutError: If there are none.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@cache
def _tls() -> ssl.SSLContext:
    """Return the one context of this process: to read the authorities takes long."""
    return ssl.create_default_context()


def _open_first(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first address that takes a connection."""
    failure: OSError = TimeoutError()
    for number, address in enumerate(addresses):
        share_s = time_left(deadline) / (len(addresses) - number)
        try:
            return socket.create_connection((address, port), timeout=share_s)
        except OSError as err:
            failure = err
    raise failure

"""How a checked place is reached: at the very address that was checked, or through a proxy."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from d2i.preprocess.fetch.deadlines import WATCHDOG
from d2i.preprocess.fetch.proxy import Proxy
from d2i.preprocess.fetch.reasons import RefusedRequestError
from d2i.preprocess.fetch.resolver import Resolver, literal_address
from d2i.preprocess.fetch.ssrf_guard import PORTS, Target, check_addresses

_NUM_ADDRESSES = 4
"""Addresses of one host that are tried, each with its share of the time to connect (ours)."""


class Route(Protocol):
    """A way to a target."""

    def open(self, target: Target, allow_hosts: frozenset[str], deadline: float) -> socket.socket:
        """Return a connection that reaches the target; TLS is still to be spoken.

        Raises:
            RefusedRequestError: Why it may or can not be reached.
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
        """Raise `RefusedRequestError` for an answer that is not the target's."""
        ...


@dataclass(frozen=True)
class Straight:
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
class ThroughProxy:
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
            raise RefusedRequestError("proxy_unreached", f"the proxy: {err}") from err
        if target.scheme == "https":
            try:
                with WATCHDOG.ending(connection, deadline):
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
    route: Route, target: Target, allow_hosts: frozenset[str], deadline: float
) -> http.client.HTTPConnection:
    """Return a connection to ask a target over; the TLS handshake is still to be made.

    Raises:
        RefusedRequestError: Why it may or can not be reached.
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

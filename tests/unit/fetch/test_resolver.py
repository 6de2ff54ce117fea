"""DNS resolver: a name is resolved once, cached, and never beyond the deadline."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from d2i.errors import ConfigError
from d2i.fetch.http_client import BodyLimits, Limits, get
from d2i.fetch.resolver import Resolver
from d2i.fetch.result import FetchError
from d2i.fetch.transport import DirectTransport
from tests.servers import Names, WebServer, name_server, running


class Fixed(Resolver):
    """A resolver with one fixed answer."""

    def __init__(self, addresses: list[str]) -> None:
        super().__init__("127.0.0.1")
        self._addresses = addresses

    def addresses(self, host: str, timeout_s: float) -> list[str]:  # noqa: ARG002
        return self._addresses


def received(silent: socket.socket) -> Iterator[bytes]:
    """The packets that have arrived at a socket that does not block."""
    with suppress(BlockingIOError):
        while True:
            yield silent.recv(512)


@contextmanager
def resolving(**addresses: list[str]) -> Iterator[tuple[Names, Resolver]]:
    names = Names({name.replace("_", "."): given for name, given in addresses.items()})
    with running(name_server(names)) as server:
        yield names, Resolver(f"127.0.0.1:{server.server_address[1]}")


def test_resolver_resolves_names_and_keeps_literals() -> None:
    with resolving(a_test=["192.0.2.7"]) as (_, resolver):
        assert resolver.addresses("a.test", 5.0) == ["192.0.2.7"]
        assert resolver.addresses("127.1", 5.0) == ["127.0.0.1"]
        assert resolver.addresses("::1", 5.0) == ["::1"]


def test_unknown_name_is_no_such_host() -> None:
    with resolving() as (names, resolver):
        for _ in range(3):
            with pytest.raises(FetchError) as caught:
                resolver.addresses("gone.test", 5.0)
            assert caught.value.reason == "no_such_host"
        assert not names.asked


def test_silent_dns_server_costs_deadline_once() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        resolver = Resolver(f"127.0.0.1:{silent.getsockname()[1]}")
        silent.setblocking(False)
        num_queries = []
        for _ in range(20):
            with pytest.raises(FetchError) as caught:
                resolver.addresses("a.test", 0.3)
            assert caught.value.reason == "dns_failed"
            num_queries.append(sum(1 for _ in received(silent)))
        assert num_queries[0] > 0
        assert num_queries[1:] == [0] * 19


def test_ssrf_guard_connects_to_checked_address_on_dns_rebinding() -> None:
    """The name moves to another address after its first answer, as in DNS rebinding."""
    with (
        running(WebServer("127.0.0.2", {"/x": lambda handler: handler.send(200, b"first")})) as one,
        running(
            WebServer("127.0.0.3", {"/x": lambda handler: handler.send(200, b"other")}, one.port)
        ) as other,
        resolving(moving_test=["127.0.0.2", "127.0.0.3"]) as (names, resolver),
    ):
        allowed = frozenset([f"moving.test:{one.port}"])
        limits = Limits(5.0, 5.0, BodyLimits(1000, 1.0), "d2i test", allowed)
        assert (
            get(f"http://moving.test:{one.port}/x", limits, DirectTransport(resolver)).body
            == b"first"
        )
        assert names.asked == {"moving.test": 1}
        assert not other.asked


def test_unreachable_address_costs_only_its_share_of_deadline() -> None:
    """The first address refuses, the second is silent with a full backlog, the third answers."""
    good = {"/x": lambda handler: handler.send(200, b"third")}
    with (
        running(WebServer("127.0.0.4", good)) as web,
        socket.create_server(("127.0.0.3", web.port), backlog=0) as full,
        ExitStack() as waiting,
    ):
        for _ in range(3):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        transport = DirectTransport(Fixed(["127.0.0.2", "127.0.0.3", "127.0.0.4"]))
        limits = Limits(
            9.0, 3.0, BodyLimits(1000, 1.0), "d2i test", frozenset([f"a.test:{web.port}"])
        )
        assert get(f"http://a.test:{web.port}/x", limits, transport).body == b"third"


@pytest.mark.parametrize("server", ["name.test", "127.0.0.1:x", "1.2.3"])
def test_dns_server_must_be_ip_address(server: str) -> None:
    with pytest.raises(ConfigError, match="--dns-server"):
        Resolver(server)

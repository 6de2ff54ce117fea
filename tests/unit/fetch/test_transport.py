"""Proxy transport: its login, and its own errors as distinct from the host's."""

from __future__ import annotations

import socket

import pytest

from d2i.fetch.http_client import BodyLimits, Limits, get
from d2i.fetch.result import FetchError
from d2i.fetch.transport import Proxy, ProxyTransport, parse_proxy
from tests.servers import ProxyServer, WebServer, running

LIMITS = Limits(5.0, 1.0, BodyLimits(1000, 1.0), "d2i test")


def reason(url: str, proxy: Proxy, limits: Limits = LIMITS) -> str:
    with pytest.raises(FetchError) as caught:
        get(url, limits, ProxyTransport(proxy))
    return caught.value.reason


def test_proxy_login_is_decoded_and_hidden_in_repr() -> None:
    proxy = parse_proxy("http://us:p%40ss@[::1]:4750/")
    assert (proxy.host, proxy.port) == ("::1", 4750)
    assert proxy.authorization == "Basic dXM6cEBzcw=="
    assert "dXM6" not in repr(proxy)
    assert parse_proxy("http://proxy.test:1").headers() == {}


def test_proxy_login_is_not_sent_to_host() -> None:
    received: list[str] = []

    def note(handler) -> None:  # type: ignore[no-untyped-def]
        received.extend(f"{name}: {value}" for name, value in handler.headers.items())
        handler.send(200, b"seen")

    with running(WebServer("127.0.0.1", {"/a%20b": note})) as web:
        hosts = {"web.test:80": ("127.0.0.1", web.port)}
        with running(ProxyServer("us:secret", hosts)) as server:
            proxy = parse_proxy(f"http://us:secret@127.0.0.1:{server.port}")
            assert get("http://web.test/a b", LIMITS, ProxyTransport(proxy)).body == b"seen"
    assert "Host: web.test" in received
    assert not any("uthorization" in line for line in received)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_wrong_proxy_login_is_proxy_refused(scheme: str) -> None:
    with running(ProxyServer("us:secret", {})) as server:
        proxy = parse_proxy(f"http://us:wrong@127.0.0.1:{server.port}")
        assert reason(f"{scheme}://web.test/x", proxy) == "proxy_refused"


def test_403_of_host_behind_proxy_is_http_403() -> None:
    answers = {"/x": lambda handler: handler.send(403)}
    with running(WebServer("127.0.0.1", answers)) as web:
        hosts = {"web.test:80": ("127.0.0.1", web.port)}
        with running(ProxyServer("us:secret", hosts)) as server:
            proxy = parse_proxy(f"http://us:secret@127.0.0.1:{server.port}")
            assert reason("http://web.test/x", proxy) == "http_403"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_deadline_ends_silent_proxy(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        limits = Limits(0.5, 0.5, LIMITS.body, "d2i test")
        proxy = Proxy("127.0.0.1", silent.getsockname()[1])
        assert reason(f"{scheme}://web.test/x", proxy, limits) == "timeout"


def test_missing_proxy_is_proxy_unreached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert reason("http://web.test/x", Proxy("127.0.0.1", port)) == "proxy_unreached"

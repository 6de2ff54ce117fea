"""A canary server on an allowed port: only the SSRF guard's address rule protects it."""

from __future__ import annotations

import pytest

from d2i.fetch import ssrf_guard
from d2i.fetch.http_client import BodyLimits, Limits, get
from d2i.fetch.resolver import Resolver
from d2i.fetch.result import FetchError
from d2i.fetch.transport import DirectTransport
from tests.servers import Names, WebServer, name_server, running


@pytest.mark.parametrize("way", ["literal", "name", "redirect", "second of two", "rebound"])
def test_ssrf_guard_keeps_internal_server_unreachable(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names({"inside.test": ["127.0.0.2"], "moving.test": ["127.0.0.3", "127.0.0.2"]})
    with (
        running(WebServer("127.0.0.2", {"/x": lambda h: h.send(200, b"secret")})) as canary,
        running(WebServer("127.0.0.3", {})) as web,
        running(name_server(names)) as server,
    ):
        monkeypatch.setitem(ssrf_guard.PORTS, "http", canary.port)
        transport = DirectTransport(Resolver(f"127.0.0.1:{server.server_address[1]}"))
        limits = Limits(
            5.0, 5.0, BodyLimits(1000, 1.0), "d2i", frozenset([f"127.0.0.3:{web.port}"])
        )
        internal_url = f"http://inside.test:{canary.port}/x"
        web.answers["/to"] = lambda h: h.send(302, Location=internal_url)
        web.answers["/on"] = lambda h: h.send(302, Location=f"http://127.0.0.3:{web.port}/to")
        urls = {
            "literal": f"http://127.0.0.2:{canary.port}/x",
            "name": internal_url,
            "redirect": f"http://127.0.0.3:{web.port}/to",
            "second of two": f"http://127.0.0.3:{web.port}/on",
            "rebound": f"http://moving.test:{canary.port}/x",
        }
        with pytest.raises(FetchError) as caught:
            get(urls[way], limits, transport)
        assert caught.value.reason == "refused_address"
        assert not canary.asked

        allowed = frozenset([f"inside.test:{canary.port}"])
        seen = get(internal_url, Limits(5.0, 5.0, limits.body, "d2i", allowed), transport)
        assert seen.body == b"secret", "reachable once it is allowed"

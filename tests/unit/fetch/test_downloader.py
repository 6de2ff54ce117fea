"""Several URLs and threads, one host: its rate limit and backoff hold for all of them."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from d2i.cluster import Session
from d2i.fetch.downloader import Downloader, RetryPolicy
from d2i.fetch.http_client import BodyLimits, Limits
from d2i.fetch.known_placeholders import KnownPlaceholders
from d2i.fetch.rate_limiter import HostLimits, RateLimiter, create_shared_limiter
from d2i.fetch.resolver import Resolver
from d2i.fetch.result import FetchResult
from d2i.fetch.ssrf_guard import allowed_hosts
from d2i.fetch.transport import DirectTransport
from tests.servers import Answer, Handler, Names, WebServer, name_server, running

GIF = b"GIF89a"
"""The first bytes of an image; no more is examined here."""


def make_downloader(
    *hosts: str,
    requests_per_s: float = 1000.0,
    num_slots: int = 4,
    timeout_s: float = 5.0,
    num_attempts: int = 1,
    dns_server: str = "127.0.0.1",
) -> Downloader:
    limits = Limits(timeout_s, 5.0, BodyLimits(1000, 1.0), "d2i test", allowed_hosts(hosts))
    limiter = RateLimiter(HostLimits(requests_per_s, 3, 60.0, 60.0, num_trouble_hosts=20))
    transport = DirectTransport(Resolver(dns_server))
    limiters = create_shared_limiter(limiter, Session(0))
    no_placeholders = KnownPlaceholders(frozenset())
    slots = threading.Semaphore(num_slots)
    return Downloader(
        limits, RetryPolicy(num_attempts, 60.0), transport, limiters, no_placeholders, slots
    )


def test_backoff_applies_to_requests_already_waiting() -> None:
    times: list[float] = []
    lock = threading.Lock()

    def is_busy_at_first(handler: Handler) -> None:
        with lock:
            times.append(time.monotonic())
            is_first = len(times) == 1
        if is_first:
            handler.send(429, Retry_After="2")
        else:
            handler.send(200, GIF)

    with running(WebServer("127.0.0.1", {"/x": is_busy_at_first})) as web:
        host = f"127.0.0.1:{web.port}"
        downloader = make_downloader(host, requests_per_s=5.0)
        deadline = time.monotonic() + 60.0
        with ThreadPoolExecutor(4) as threads:
            found = list(
                threads.map(lambda _: downloader.fetch([f"http://{host}/x"], deadline), range(4))
            )
    assert sorted(one.reason for one in found) == ["http_429", "ok", "ok", "ok"]
    # All four had their turns within 0.6 s of the first.
    assert all(later - times[0] >= 2.0 for later in times[1:])


def test_retry_policy_for_busy_host_delays_no_other() -> None:
    """Thirty images, three attempts each, with a second of backoff after each attempt."""
    answers = {
        "/busy": lambda handler: handler.send(429, Retry_After="1"),
        "/x": lambda handler: handler.send(200, GIF),
    }
    with (
        running(WebServer("127.0.0.1", answers)) as busy,
        running(WebServer("127.0.0.1", answers)) as web,
        ThreadPoolExecutor(4) as threads,
    ):
        hosts = [f"127.0.0.1:{server.port}" for server in (busy, web)]
        downloader = make_downloader(*hosts, num_attempts=3)
        urls = [f"http://{hosts[0]}/busy"] * 30 + [f"http://{hosts[1]}/x"] * 4
        deadline = time.monotonic() + 60.0
        found = list(threads.map(lambda url: downloader.fetch([url], deadline), urls))
    assert [one.reason for one in found[30:]] == ["ok"] * 4
    assert {one.reason for one in found[:30]} <= {"http_429", "dead_host"}
    # Four requests may be in flight whenever a backoff ends.
    assert 3 <= busy.asked["/busy"] <= 12


def test_request_past_deadline_takes_no_rate_limit_turn() -> None:
    with running(WebServer("127.0.0.1", {"/x": lambda handler: handler.send(200, GIF)})) as web:
        host = f"127.0.0.1:{web.port}"
        downloader = make_downloader(host, requests_per_s=0.5)
        url = [f"http://{host}/x"]
        assert downloader.fetch(url, time.monotonic() + 60.0).reason == "ok"
        for _ in range(20):
            assert downloader.fetch(url, time.monotonic() + 0.1).reason == "shard_timeout"
        # Had each taken a turn, this one would be 42 s away.
        assert downloader.fetch(url, time.monotonic() + 20.0).reason == "ok"
    assert web.asked["/x"] == 2


@pytest.mark.parametrize("page", [b"<html>gone</html>", b"<svg/>", b"", b"GIF89", b" GIF89a"])
def test_next_url_is_tried_when_first_is_not_an_image(page: bytes) -> None:
    answers = {
        "/page": lambda handler: handler.send(200, page),
        "/x": lambda handler: handler.send(200, GIF),
    }
    with running(WebServer("127.0.0.1", answers)) as web:
        host = f"127.0.0.1:{web.port}"
        downloader = make_downloader(host)
        urls = [f"http://{host}/page", f"http://{host}/x"]
        found = downloader.fetch(urls, time.monotonic() + 60.0)
        none = downloader.fetch(urls[:1] * 2, time.monotonic() + 60.0)
    assert (found.data, found.attempts, found.final_url) == (GIF, 2, urls[1])
    assert (none.reason, none.attempts, none.http_status) == ("not_an_image", 2, 200)


def redirect_to(target: str) -> Answer:
    return lambda handler: handler.send(302, Location=target)


def test_redirects_to_unknown_hosts_are_no_outage() -> None:
    answers = {f"/{n}": redirect_to(f"http://no{n}.test/x.jpg") for n in range(12)}
    with (
        running(WebServer("127.0.0.1", answers)) as web,
        running(name_server(Names({}))) as dns,
    ):
        host = f"127.0.0.1:{web.port}"
        downloader = make_downloader(host, dns_server=f"127.0.0.1:{dns.server_address[1]}")
        deadline = time.monotonic() + 60.0
        found = [downloader.fetch([f"http://{host}{path}"], deadline) for path in answers]
    assert {one.reason for one in found} == {"no_such_host"}
    assert found[3].final_url == "http://no3.test/x.jpg"
    assert downloader.hosts.outage_reason(of_names=False) is None


def test_redirects_to_disallowed_port_are_no_outage() -> None:
    names = Names({f"h{n}.test": ["127.0.0.1"] for n in range(9)})
    with (
        running(WebServer("127.0.0.1", {"/x": redirect_to("https://a.test:8443/y")})) as web,
        running(name_server(names)) as dns,
    ):
        hosts = [f"{name}:{web.port}" for name in names.addresses]
        downloader = make_downloader(*hosts, dns_server=f"127.0.0.1:{dns.server_address[1]}")
        deadline = time.monotonic() + 60.0
        found = [downloader.fetch([f"http://{host}/x"], deadline) for host in hosts]
    assert {(one.reason, one.final_url, one.attempts) for one in found} == {
        ("refused_address", "https://a.test:8443/y", 1)
    }
    assert downloader.hosts.outage_reason(of_names=False) is None


def test_redirects_cannot_open_circuit_breaker_of_other_host() -> None:
    """Even with many redirects that leave the other host no time to answer."""
    with (
        running(WebServer("127.0.0.1", {})) as web,
        socket.create_server(("127.0.0.1", 0), backlog=64) as silent,
    ):
        sender, victim = f"127.0.0.1:{web.port}", f"127.0.0.1:{silent.getsockname()[1]}"
        web.answers["/x"] = redirect_to(f"http://{victim}/x")
        downloader = make_downloader(sender, victim, timeout_s=0.3)
        deadline = time.monotonic() + 60.0
        for _ in range(4):
            assert downloader.fetch([f"http://{sender}/x"], deadline).reason == "timeout"
        assert downloader.hosts.of(victim).call("acquire", victim, 60.0) is not None
        for _ in range(3):
            assert downloader.fetch([f"http://{victim}/x"], deadline).reason == "timeout"
        assert downloader.hosts.of(victim).call("acquire", victim, 60.0) is None


def test_waiting_requests_hold_no_connection_slot() -> None:
    """Six threads, two slots: a host in backoff leaves both slots to another host."""
    num_active, max_active = 0, 0
    lock = threading.Lock()
    both = threading.Barrier(2, timeout=60)

    def counts(handler: Handler) -> None:
        nonlocal num_active, max_active
        with lock:
            num_active += 1
            max_active = max(max_active, num_active)
        both.wait()
        with lock:
            num_active -= 1
        handler.send(200, GIF)

    with (
        running(WebServer("127.0.0.1", {"/x": counts})) as web,
        running(WebServer("127.0.0.1", {"/x": lambda handler: handler.send(200, GIF)})) as other,
        ThreadPoolExecutor(6) as threads,
    ):
        free, busy = f"127.0.0.1:{web.port}", f"127.0.0.1:{other.port}"
        downloader = make_downloader(free, busy, requests_per_s=1000.0, num_slots=2)
        downloader.hosts.of(busy).call("report", busy, "reached", retry_after_s=5.0)
        deadline = time.monotonic() + 60.0

        def fetch(host: str) -> FetchResult:
            return downloader.fetch([f"http://{host}/x"], deadline)

        late = [threads.submit(fetch, busy) for _ in range(2)]
        found = list(threads.map(fetch, [free] * 4))
        assert not any(one.done() for one in late)
        found += [one.result() for one in late]
    assert [one.reason for one in found] == ["ok"] * 6
    assert max_active == 2

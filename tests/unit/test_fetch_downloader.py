"""Several addresses, several threads, one host: manners hold for all who ask it."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from d2i.preprocess.fetch.downloader import Downloader, RetryPolicy
from d2i.preprocess.fetch.http_client import BodyLimits, Limits
from d2i.preprocess.fetch.known_placeholders import KnownPlaceholders
from d2i.preprocess.fetch.rate_limiter import HostLimits, RateLimiter, create_shared_limiter
from d2i.preprocess.fetch.resolver import Resolver
from d2i.preprocess.fetch.result import FetchResult
from d2i.preprocess.fetch.ssrf_guard import allowed_hosts
from d2i.preprocess.fetch.transport import DirectTransport
from tests.servers import Answer, Handler, Names, WebServer, name_server, running

GIF = b"GIF89a"
"""As much of a picture as is looked at here."""


def fetcher(
    *hosts: str,
    requests_per_s: float = 1000.0,
    num_slots: int = 4,
    timeout_s: float = 5.0,
    num_attempts: int = 1,
    dns_server: str = "127.0.0.1",
) -> Downloader:
    limits = Limits(timeout_s, 5.0, BodyLimits(1000, 1.0), "d2i test", allowed_hosts(hosts))
    book = RateLimiter(HostLimits(requests_per_s, 3, 60.0, 60.0, num_trouble_hosts=20))
    route = DirectTransport(Resolver(dns_server))
    limiters = create_shared_limiter(book, num_workers=0)
    nothing = KnownPlaceholders(frozenset())
    slots = threading.Semaphore(num_slots)
    return Downloader(limits, RetryPolicy(num_attempts, 60.0), route, limiters, nothing, slots)


def test_backoff_is_kept_by_requests_that_already_wait() -> None:
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
        asked = fetcher(host, requests_per_s=5.0)
        deadline = time.monotonic() + 60.0
        with ThreadPoolExecutor(4) as threads:
            found = list(
                threads.map(lambda _: asked.fetch([f"http://{host}/x"], deadline), range(4))
            )
    assert sorted(one.reason for one in found) == ["http_429", "ok", "ok", "ok"]
    # All four had their turns within 0.6 s of the first.
    assert all(later - times[0] >= 2.0 for later in times[1:])


def test_retry_policy_for_a_busy_host_delays_no_other() -> None:
    """Thirty pictures, each to be asked for three times, with a second of peace after each."""
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
        asked = fetcher(*hosts, num_attempts=3)
        urls = [f"http://{hosts[0]}/busy"] * 30 + [f"http://{hosts[1]}/x"] * 4
        deadline = time.monotonic() + 60.0
        found = list(threads.map(lambda url: asked.fetch([url], deadline), urls))
    assert [one.reason for one in found[30:]] == ["ok"] * 4
    assert {one.reason for one in found[:30]} <= {"http_429", "dead_host"}
    # Four may be under way whenever a peace is over.
    assert 3 <= busy.asked["/busy"] <= 12


def test_who_cannot_wait_takes_no_turn() -> None:
    with running(WebServer("127.0.0.1", {"/x": lambda handler: handler.send(200, GIF)})) as web:
        host = f"127.0.0.1:{web.port}"
        asked = fetcher(host, requests_per_s=0.5)
        url = [f"http://{host}/x"]
        assert asked.fetch(url, time.monotonic() + 60.0).reason == "ok"
        for _ in range(20):
            assert asked.fetch(url, time.monotonic() + 0.1).reason == "shard_timeout"
        # Had each taken a turn, this one would be 42 s away.
        assert asked.fetch(url, time.monotonic() + 20.0).reason == "ok"
    assert web.asked["/x"] == 2


@pytest.mark.parametrize("page", [b"<html>gone</html>", b"<svg/>", b"", b"GIF89", b" GIF89a"])
def test_the_next_address_is_asked_where_the_first_gives_no_picture(page: bytes) -> None:
    answers = {
        "/page": lambda handler: handler.send(200, page),
        "/x": lambda handler: handler.send(200, GIF),
    }
    with running(WebServer("127.0.0.1", answers)) as web:
        host = f"127.0.0.1:{web.port}"
        asked = fetcher(host)
        urls = [f"http://{host}/page", f"http://{host}/x"]
        found = asked.fetch(urls, time.monotonic() + 60.0)
        none = asked.fetch(urls[:1] * 2, time.monotonic() + 60.0)
    assert (found.data, found.attempts, found.final_url) == (GIF, 2, urls[1])
    assert (none.reason, none.attempts, none.http_status) == ("not_an_image", 2, 200)


def sends_on(target: str) -> Answer:
    return lambda handler: handler.send(302, Location=target)


def test_a_host_that_sends_us_nowhere_is_no_trouble_of_our_own() -> None:
    answers = {f"/{n}": sends_on(f"http://no{n}.test/x.jpg") for n in range(12)}
    with (
        running(WebServer("127.0.0.1", answers)) as web,
        running(name_server(Names({}))) as dns,
    ):
        host = f"127.0.0.1:{web.port}"
        asked = fetcher(host, dns_server=f"127.0.0.1:{dns.server_address[1]}")
        deadline = time.monotonic() + 60.0
        found = [asked.fetch([f"http://{host}{path}"], deadline) for path in answers]
    assert {one.reason for one in found} == {"no_such_host"}
    assert found[3].final_url == "http://no3.test/x.jpg"
    assert asked.hosts.outage_reason(of_names=False) is None


def test_a_redirect_to_where_none_may_ask_is_not_the_fault_of_who_sends_us_there() -> None:
    names = Names({f"h{n}.test": ["127.0.0.1"] for n in range(9)})
    with (
        running(WebServer("127.0.0.1", {"/x": sends_on("https://a.test:8443/y")})) as web,
        running(name_server(names)) as dns,
    ):
        hosts = [f"{name}:{web.port}" for name in names.addresses]
        asked = fetcher(*hosts, dns_server=f"127.0.0.1:{dns.server_address[1]}")
        deadline = time.monotonic() + 60.0
        found = [asked.fetch([f"http://{host}/x"], deadline) for host in hosts]
    assert {(one.reason, one.final_url, one.attempts) for one in found} == {
        ("refused_address", "https://a.test:8443/y", 1)
    }
    assert asked.hosts.outage_reason(of_names=False) is None


def test_who_sends_us_on_cannot_have_another_host_left_alone() -> None:
    """As often as it likes, and too late for the other one to answer."""
    with (
        running(WebServer("127.0.0.1", {})) as web,
        socket.create_server(("127.0.0.1", 0), backlog=64) as silent,
    ):
        sender, victim = f"127.0.0.1:{web.port}", f"127.0.0.1:{silent.getsockname()[1]}"
        web.answers["/x"] = sends_on(f"http://{victim}/x")
        asked = fetcher(sender, victim, timeout_s=0.3)
        deadline = time.monotonic() + 60.0
        for _ in range(4):
            assert asked.fetch([f"http://{sender}/x"], deadline).reason == "timeout"
        assert asked.hosts.of(victim).call("acquire", victim, 60.0) is not None
        for _ in range(3):
            assert asked.fetch([f"http://{victim}/x"], deadline).reason == "timeout"
        assert asked.hosts.of(victim).call("acquire", victim, 60.0) is None


def test_only_so_many_requests_are_under_way_and_who_waits_for_a_turn_is_none() -> None:
    """Four threads, two slots: a host that wants peace leaves both to another host."""
    under_way, most = 0, 0
    lock = threading.Lock()
    both = threading.Barrier(2, timeout=60)

    def counts(handler: Handler) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        both.wait()
        with lock:
            under_way -= 1
        handler.send(200, GIF)

    with (
        running(WebServer("127.0.0.1", {"/x": counts})) as web,
        running(WebServer("127.0.0.1", {"/x": lambda handler: handler.send(200, GIF)})) as other,
        ThreadPoolExecutor(6) as threads,
    ):
        free, busy = f"127.0.0.1:{web.port}", f"127.0.0.1:{other.port}"
        asked = fetcher(free, busy, requests_per_s=1000.0, num_slots=2)
        asked.hosts.of(busy).call("report", busy, "reached", retry_after_s=5.0)
        deadline = time.monotonic() + 60.0

        def fetch(host: str) -> FetchResult:
            return asked.fetch([f"http://{host}/x"], deadline)

        late = [threads.submit(fetch, busy) for _ in range(2)]
        found = list(threads.map(fetch, [free] * 4))
        assert not any(one.done() for one in late)
        found += [one.result() for one in late]
    assert [one.reason for one in found] == ["ok"] * 6
    assert most == 2

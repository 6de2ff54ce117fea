"""Several addresses, several threads, one host: manners hold for all who ask it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from d2i.cluster import share
from d2i.preprocess.fetch.addresses import AddressFetcher, Courtesy
from d2i.preprocess.fetch.body import BodyLimits
from d2i.preprocess.fetch.connect import Straight
from d2i.preprocess.fetch.guard import allowed_hosts
from d2i.preprocess.fetch.hosts import HostBook, HostLimits
from d2i.preprocess.fetch.placeholders import Placeholders
from d2i.preprocess.fetch.request import Limits
from d2i.preprocess.fetch.resolver import Resolver
from tests.servers import Handler, WebServer, running


def fetcher(host: str, requests_per_s: float) -> AddressFetcher:
    limits = Limits(5.0, 5.0, BodyLimits(1000, 1.0), "d2i test", allowed_hosts([host]))
    book = HostBook(HostLimits(requests_per_s, 3, 60.0, max_retry_after_s=60.0))
    route = Straight(Resolver("127.0.0.1"))
    shared = share(book, num_workers=0)
    return AddressFetcher(limits, Courtesy(1, 60.0), route, shared, Placeholders(frozenset()))


def test_peace_is_kept_by_those_who_already_wait_for_their_turn() -> None:
    times: list[float] = []
    lock = threading.Lock()

    def is_busy_at_first(handler: Handler) -> None:
        with lock:
            times.append(time.monotonic())
            is_first = len(times) == 1
        if is_first:
            handler.send(429, Retry_After="2")
        else:
            handler.send(200, b"x")

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


def test_who_cannot_wait_takes_no_turn() -> None:
    with running(WebServer("127.0.0.1", {"/x": lambda handler: handler.send(200, b"x")})) as web:
        host = f"127.0.0.1:{web.port}"
        asked = fetcher(host, requests_per_s=0.5)
        url = [f"http://{host}/x"]
        assert asked.fetch(url, time.monotonic() + 60.0).reason == "ok"
        for _ in range(20):
            assert asked.fetch(url, time.monotonic() + 0.1).reason == "shard_timeout"
        # Had each taken a turn, this one would be 42 s away.
        assert asked.fetch(url, time.monotonic() + 20.0).reason == "ok"
    assert web.asked["/x"] == 2

"""Manners: turns at a host's pace, peace where it is asked for, dead hosts, our own trouble."""

from __future__ import annotations

import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2i.cluster import create_shared
from d2i.preprocess.fetch.rate_limiter import (
    HostLimits,
    Outcome,
    RateLimiter,
    ShardedRateLimiter,
    create_shared_limiter,
    detect_outage,
)
from d2i.preprocess.fetch.result import is_transient

PATIENCE_S = 1000.0
OUTCOMES: list[Outcome] = ["reached", "unreached", "unnamed"]


def book(
    requests_per_s: float = 10.0, dead_s: float = 60.0, num_trouble_hosts: int = 20
) -> RateLimiter:
    limits = HostLimits(
        requests_per_s,
        num_failures=3,
        dead_s=dead_s,
        max_retry_after_s=60.0,
        num_trouble_hosts=num_trouble_hosts,
    )
    return RateLimiter(limits)


def reserved(hosts: RateLimiter, host: str) -> float:
    wait_s = hosts.acquire(host, PATIENCE_S)
    assert wait_s is not None
    return wait_s


def trouble(hosts: RateLimiter, *, of_names: bool = False) -> str | None:
    signs = hosts.network_health(of_names=of_names)
    return detect_outage([signs], hosts.limits.num_trouble_hosts, of_names=of_names)


def test_rate_limit_spaces_requests_to_one_host_and_delays_no_other() -> None:
    hosts = book()
    waits = [reserved(hosts, "a") for _ in range(5)]
    assert waits[0] == 0.0
    assert waits == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=0.05)
    assert reserved(hosts, "b") == 0.0


def test_backoff_is_kept_as_long_as_the_host_asks() -> None:
    hosts = book()
    hosts.report("a", "reached", retry_after_s=30.0)
    assert 29.0 < reserved(hosts, "a") <= 30.0
    assert reserved(hosts, "b") == 0.0
    hosts.report("b", "reached", retry_after_s=3600.0)
    assert hosts.acquire("b", PATIENCE_S) is None


def test_a_request_that_cannot_wait_takes_no_turn() -> None:
    hosts = book(requests_per_s=1.0)
    assert reserved(hosts, "a") == 0.0
    for _ in range(5):
        wait_s = hosts.acquire("a", 0.5)
        assert wait_s is not None
        assert 0.5 < wait_s <= 1.0
    assert reserved(hosts, "a") <= 1.0


def test_a_waiting_request_learns_of_a_backoff() -> None:
    hosts = book()
    reserved(hosts, "a")
    assert reserved(hosts, "a") > 0.0
    assert not hosts.in_backoff("a")
    hosts.report("a", "reached", retry_after_s=30.0)
    assert hosts.in_backoff("a")
    assert not hosts.in_backoff("b")
    assert reserved(hosts, "a") > 29.0


def test_a_proxy_that_is_down_is_our_own_trouble_and_no_hosts() -> None:
    hosts = book()
    for _ in range(3):
        assert trouble(hosts) is None
        assert hosts.acquire("a", PATIENCE_S) is not None
        hosts.report_proxy_unreached()
    assert "the proxy could not be reached 3 times" in str(trouble(hosts))
    assert hosts.acquire("a", PATIENCE_S) is None
    hosts.report("a", "reached")
    assert trouble(hosts) is None


def test_circuit_breaker_opens_after_failures_in_a_row_and_closes_again() -> None:
    hosts = book(dead_s=0.0)
    for _ in range(3):
        hosts.report("a", "unreached")
    assert hosts.acquire("a", PATIENCE_S) is not None
    hosts = book()
    for reached in (False, False, True, False, False):
        hosts.report("a", "reached" if reached else "unreached")
    assert hosts.acquire("a", PATIENCE_S) is not None
    hosts.report("a", "unreached")
    assert hosts.acquire("a", PATIENCE_S) is None


def test_a_mirror_is_one_host_and_all_pictures() -> None:
    hosts = RateLimiter(book().limits, mirror="m")
    hosts.report("other", "unreached")
    assert trouble(hosts) is None
    hosts.report("m", "unnamed")
    assert "the mirror m could not be reached" in str(trouble(hosts))
    assert trouble(hosts, of_names=True) == trouble(hosts)
    # One that has answered may miss a deadline.
    for outcome in ("reached", "unreached", "unreached"):
        hosts.report("m", outcome)
        assert trouble(hosts) is None
    hosts.report("m", "unreached")
    assert trouble(hosts) is not None
    assert trouble(hosts, of_names=True) is None


def test_a_few_hosts_of_which_none_answers_are_trouble() -> None:
    hosts = book()
    for number in range(7):
        hosts.report(f"h{number}", "unreached")
        hosts.report(f"h{number}", "unreached")
    assert trouble(hosts) is None
    hosts.report("h7", "unreached")
    assert "8 of the last 8" in str(trouble(hosts))


@pytest.mark.parametrize(("num_reached", "is_outage"), [(2, True), (3, False)])
def test_outage_is_detected_where_most_hosts_of_a_window_are_dead(
    num_reached: int, is_outage: bool
) -> None:
    hosts = book()
    for number in range(20):
        hosts.report(f"h{number}", "reached" if number < num_reached else "unreached")
    assert (trouble(hosts) is not None) is is_outage


def asked(hosts: RateLimiter, host: str, outcome: Outcome) -> None:
    assert hosts.acquire(host, PATIENCE_S) is not None
    hosts.report(host, outcome)


def test_a_cable_that_is_pulled_is_trouble_and_rotten_hosts_between_good_ones_are_not() -> None:
    hosts = book()
    for number in range(100):
        asked(hosts, f"good{number}", "reached")
    for number in range(18):
        asked(hosts, f"rotten{number}", "unreached")
        asked(hosts, f"good{number}", "reached")
    assert trouble(hosts) is None
    for number in range(100):
        asked(hosts, f"good{number}", "unreached")
    assert trouble(hosts) is not None


def test_no_outage_is_detected_for_dead_hosts_that_are_given_up_last() -> None:
    """They were asked between the others, which answered long before."""
    hosts = book()
    for number in range(80):
        hosts.acquire(f"h{number}", PATIENCE_S)
    for number in range(80):
        if number % 4:
            hosts.report(f"h{number}", "reached")
    for number in range(0, 80, 4):
        hosts.report(f"h{number}", "unreached")
    assert trouble(hosts) is None


@pytest.mark.parametrize(("window", "said"), [(0, "None"), (4, "4 of the last 4"), (30, "9 of")])
def test_how_many_dead_hosts_are_trouble_can_be_said(window: int, said: str) -> None:
    hosts = book(num_trouble_hosts=window)
    for number in range(9):
        asked(hosts, f"dead{number}", "unreached")
    assert said in str(trouble(hosts))


def test_a_live_host_that_is_asked_again_and_again_is_known_to_live() -> None:
    hosts = book()
    asked(hosts, "live", "reached")
    for number in range(8):
        asked(hosts, f"dead{number}", "unreached")
    hosts.acquire("live", PATIENCE_S)
    assert trouble(hosts) is None
    hosts.report("live", "unreached")
    assert "9 of the last 9" in str(trouble(hosts))


def test_where_others_send_us_says_nothing_of_our_own_network() -> None:
    hosts = book()
    for number in range(20):
        asked(hosts, f"h{number}", "unnamed" if number < 17 else "reached")
    assert trouble(hosts) is None
    for number in range(17):
        hosts.acquire(f"h{number}", PATIENCE_S, is_named=False)
        hosts.acquire(f"other{number}", PATIENCE_S, is_named=False)
    asked(hosts, "last", "reached")
    assert trouble(hosts) is None


def test_names_that_all_lead_nowhere_are_trouble_of_our_own_also_when_asked_again() -> None:
    hosts = book()
    for number in range(8):
        hosts.acquire(f"h{number}", PATIENCE_S)
        hosts.report(f"h{number}", "unnamed")
    assert "8 of the last 8" in str(trouble(hosts))
    assert trouble(hosts, of_names=True) == trouble(hosts)
    asked(hosts, "dead", "unreached")
    assert trouble(hosts, of_names=True) is None


def test_a_longer_backoff_is_not_cut_by_a_shorter_one_nor_waited_for() -> None:
    hosts = book()
    hosts.report("a", "reached", retry_after_s=3000.0)
    hosts.report("a", "reached", retry_after_s=61.0)
    assert hosts.acquire("a", 1e6) is None
    hosts = book(dead_s=0.0)
    hosts.report("a", "reached", retry_after_s=50.0)
    assert 49.0 < reserved(hosts, "a") <= 50.0


def test_circuit_breaker_opens_after_backoffs_in_a_row() -> None:
    hosts = book(requests_per_s=1000.0)
    # Of one moment: those under way at once.
    for _ in range(9):
        hosts.report("a", "reached", retry_after_s=0.05)
    for _ in range(2):
        assert hosts.acquire("a", PATIENCE_S) is not None
        # Longer than the peace.
        time.sleep(0.06)
        hosts.report("a", "reached", retry_after_s=0.05)
    assert hosts.acquire("a", PATIENCE_S) is None


@pytest.mark.parametrize(("peace_s", "is_left_alone"), [(0.05, False), (1.05, True)])
def test_a_second_of_backoff_is_paid_by_an_answer(peace_s: float, is_left_alone: bool) -> None:
    hosts = book(requests_per_s=1000.0)
    for number in range(3):
        hosts.report("a", "reached", retry_after_s=peace_s)
        assert (hosts.acquire("a", PATIENCE_S) is None) is (is_left_alone and number == 2)
        # Longer than the peace.
        time.sleep(peace_s + 0.01)
        hosts.report("a", "reached")


@settings(deadline=None)
@given(
    asked_hosts=st.lists(st.tuples(st.integers(0, 15), st.sampled_from(OUTCOMES)), max_size=60),
    of_names=st.booleans(),
)
def test_sharded_limiters_know_what_one_does(
    asked_hosts: list[tuple[int, Outcome]], *, of_names: bool
) -> None:
    several = ShardedRateLimiter(
        tuple(create_shared(book(1e6), num_workers=0) for _ in range(4)), 20
    )
    one = create_shared_limiter(book(1e6), num_workers=0)
    assert len(one.limiters) == 1
    for number, outcome in asked_hosts:
        host = f"h{number}"
        for limiters in (one, several):
            limiters.of(host).call("acquire", host, PATIENCE_S)
            limiters.of(host).call("report", host, outcome)
    assert several.outage_reason(of_names=of_names) == one.outage_reason(of_names=of_names)
    assert len({id(several.of(f"h{number}")) for number in range(16)}) > 1


def test_a_book_for_every_sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_cores, num_limiters in ((1, 1), (31, 1), (64, 4), (10_000, 16)):
        monkeypatch.setattr(
            "d2i.preprocess.fetch.rate_limiter.num_session_cores", lambda num=num_cores, **_: num
        )
        assert len(create_shared_limiter(book(), num_workers=0).limiters) == num_limiters


def test_a_shared_book_is_one_in_this_process() -> None:
    shared = create_shared(book(), num_workers=0)
    assert shared.call("acquire", "a", PATIENCE_S) == 0.0
    assert shared.call("acquire", "a", PATIENCE_S) > 0.0
    assert pickle.loads(pickle.dumps(shared)).call("acquire", "a", PATIENCE_S) > 0.0


@pytest.mark.parametrize(
    ("reason", "passing"),
    [
        *((f"http_{status}", True) for status in (408, 425, 429, 500, 503)),
        *((f"http_{status}", False) for status in (400, 403, 404, 410)),
        *((name, True) for name in ("timeout", "connect", "tls", "dead_host", "decode_timeout")),
        *((name, False) for name in ("no_such_host", "placeholder", "decode_error", "robots")),
    ],
)
def test_what_may_come_back_is_told_from_what_will_not(reason: str, passing: bool) -> None:
    assert is_transient(reason) is passing

"""Rate limiter: rate limit and backoff of hosts, circuit breaker, and outage detection."""

from __future__ import annotations

import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2i.cluster import Session
from d2i.fetch.rate_limiter import (
    HostLimits,
    Outcome,
    RateLimiter,
    ShardedRateLimiter,
    create_shared_limiter,
    detect_outage,
)
from d2i.fetch.result import is_transient

TIMEOUT_S = 1000.0
OUTCOMES: list[Outcome] = ["reached", "unreached", "unnamed"]


def make_limiter(
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


def acquired(limiter: RateLimiter, host: str) -> float:
    wait_s = limiter.acquire(host, TIMEOUT_S)
    assert wait_s is not None
    return wait_s


def outage(limiter: RateLimiter, *, of_names: bool = False) -> str | None:
    health = limiter.network_health(of_names=of_names)
    return detect_outage([health], limiter.limits.num_trouble_hosts, of_names=of_names)


def test_rate_limit_spaces_requests_to_one_host_only() -> None:
    limiter = make_limiter()
    waits = [acquired(limiter, "a") for _ in range(5)]
    assert waits[0] == 0.0
    assert waits == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=0.05)
    assert acquired(limiter, "b") == 0.0


def test_backoff_lasts_as_long_as_retry_after() -> None:
    limiter = make_limiter()
    limiter.report("a", "reached", retry_after_s=30.0)
    assert 29.0 < acquired(limiter, "a") <= 30.0
    assert acquired(limiter, "b") == 0.0
    limiter.report("b", "reached", retry_after_s=3600.0)
    assert limiter.acquire("b", TIMEOUT_S) is None


def test_acquire_beyond_timeout_takes_no_turn() -> None:
    limiter = make_limiter(requests_per_s=1.0)
    assert acquired(limiter, "a") == 0.0
    for _ in range(5):
        wait_s = limiter.acquire("a", 0.5)
        assert wait_s is not None
        assert 0.5 < wait_s <= 1.0
    assert acquired(limiter, "a") <= 1.0


def test_waiting_request_sees_new_backoff() -> None:
    limiter = make_limiter()
    acquired(limiter, "a")
    assert acquired(limiter, "a") > 0.0
    assert not limiter.in_backoff("a")
    limiter.report("a", "reached", retry_after_s=30.0)
    assert limiter.in_backoff("a")
    assert not limiter.in_backoff("b")
    assert acquired(limiter, "a") > 29.0


def test_unreached_proxy_is_outage_and_no_host_failure() -> None:
    limiter = make_limiter()
    for _ in range(3):
        assert outage(limiter) is None
        assert limiter.acquire("a", TIMEOUT_S) is not None
        limiter.report_proxy_unreached()
    assert "the proxy could not be reached 3 times" in str(outage(limiter))
    assert limiter.acquire("a", TIMEOUT_S) is None
    limiter.report("a", "reached")
    assert outage(limiter) is None


def test_circuit_breaker_opens_after_failures_in_a_row_and_closes_again() -> None:
    limiter = make_limiter(dead_s=0.0)
    for _ in range(3):
        limiter.report("a", "unreached")
    assert limiter.acquire("a", TIMEOUT_S) is not None
    limiter = make_limiter()
    for reached in (False, False, True, False, False):
        limiter.report("a", "reached" if reached else "unreached")
    assert limiter.acquire("a", TIMEOUT_S) is not None
    limiter.report("a", "unreached")
    assert limiter.acquire("a", TIMEOUT_S) is None


def test_unreached_mirror_is_outage() -> None:
    limiter = RateLimiter(make_limiter().limits, mirror="m")
    limiter.report("other", "unreached")
    assert outage(limiter) is None
    limiter.report("m", "unnamed")
    assert "the mirror m could not be reached" in str(outage(limiter))
    assert outage(limiter, of_names=True) == outage(limiter)
    # A mirror that has answered may miss a deadline.
    for outcome in ("reached", "unreached", "unreached"):
        limiter.report("m", outcome)
        assert outage(limiter) is None
    limiter.report("m", "unreached")
    assert outage(limiter) is not None
    assert outage(limiter, of_names=True) is None


def test_outage_is_detected_when_all_of_few_hosts_fail() -> None:
    limiter = make_limiter()
    for number in range(7):
        limiter.report(f"h{number}", "unreached")
        limiter.report(f"h{number}", "unreached")
    assert outage(limiter) is None
    limiter.report("h7", "unreached")
    assert "8 of the last 8" in str(outage(limiter))


@pytest.mark.parametrize(("num_reached", "is_outage"), [(2, True), (3, False)])
def test_outage_is_detected_when_most_hosts_of_window_are_dead(
    num_reached: int, is_outage: bool
) -> None:
    limiter = make_limiter()
    for number in range(20):
        limiter.report(f"h{number}", "reached" if number < num_reached else "unreached")
    assert (outage(limiter) is not None) is is_outage


def request(limiter: RateLimiter, host: str, outcome: Outcome) -> None:
    assert limiter.acquire(host, TIMEOUT_S) is not None
    limiter.report(host, outcome)


def test_outage_is_detected_but_not_for_scattered_dead_hosts() -> None:
    limiter = make_limiter()
    for number in range(100):
        request(limiter, f"good{number}", "reached")
    for number in range(18):
        request(limiter, f"rotten{number}", "unreached")
        request(limiter, f"good{number}", "reached")
    assert outage(limiter) is None
    for number in range(100):
        request(limiter, f"good{number}", "unreached")
    assert outage(limiter) is not None


def test_no_outage_is_detected_for_dead_hosts_reported_last() -> None:
    """They were requested between the others, which answered long before."""
    limiter = make_limiter()
    for number in range(80):
        limiter.acquire(f"h{number}", TIMEOUT_S)
    for number in range(80):
        if number % 4:
            limiter.report(f"h{number}", "reached")
    for number in range(0, 80, 4):
        limiter.report(f"h{number}", "unreached")
    assert outage(limiter) is None


@pytest.mark.parametrize(
    ("window", "expected"), [(0, "None"), (4, "4 of the last 4"), (30, "9 of")]
)
def test_outage_window_is_configurable(window: int, expected: str) -> None:
    limiter = make_limiter(num_trouble_hosts=window)
    for number in range(9):
        request(limiter, f"dead{number}", "unreached")
    assert expected in str(outage(limiter))


def test_pending_request_to_live_host_is_no_outage() -> None:
    limiter = make_limiter()
    request(limiter, "live", "reached")
    for number in range(8):
        request(limiter, f"dead{number}", "unreached")
    limiter.acquire("live", TIMEOUT_S)
    assert outage(limiter) is None
    limiter.report("live", "unreached")
    assert "9 of the last 9" in str(outage(limiter))


def test_redirect_targets_do_not_count_towards_outage() -> None:
    limiter = make_limiter()
    for number in range(20):
        request(limiter, f"h{number}", "unnamed" if number < 17 else "reached")
    assert outage(limiter) is None
    for number in range(17):
        limiter.acquire(f"h{number}", TIMEOUT_S, is_named=False)
        limiter.acquire(f"other{number}", TIMEOUT_S, is_named=False)
    request(limiter, "last", "reached")
    assert outage(limiter) is None


def test_outage_is_detected_when_no_name_resolves() -> None:
    limiter = make_limiter()
    for number in range(8):
        limiter.acquire(f"h{number}", TIMEOUT_S)
        limiter.report(f"h{number}", "unnamed")
    assert "8 of the last 8" in str(outage(limiter))
    assert outage(limiter, of_names=True) == outage(limiter)
    request(limiter, "dead", "unreached")
    assert outage(limiter, of_names=True) is None


def test_longer_backoff_is_not_cut_by_shorter_one() -> None:
    limiter = make_limiter()
    limiter.report("a", "reached", retry_after_s=3000.0)
    limiter.report("a", "reached", retry_after_s=61.0)
    assert limiter.acquire("a", 1e6) is None
    limiter = make_limiter(dead_s=0.0)
    limiter.report("a", "reached", retry_after_s=50.0)
    assert 49.0 < acquired(limiter, "a") <= 50.0


def test_circuit_breaker_opens_after_backoffs_in_a_row() -> None:
    limiter = make_limiter(requests_per_s=1000.0)
    # All at one moment, from requests in flight together: counted once.
    for _ in range(9):
        limiter.report("a", "reached", retry_after_s=0.05)
    for _ in range(2):
        assert limiter.acquire("a", TIMEOUT_S) is not None
        # Longer than the backoff.
        time.sleep(0.06)
        limiter.report("a", "reached", retry_after_s=0.05)
    assert limiter.acquire("a", TIMEOUT_S) is None


@pytest.mark.parametrize(("backoff_s", "is_open"), [(0.05, False), (1.05, True)])
def test_backoff_count_resets_after_one_answer_per_second(backoff_s: float, is_open: bool) -> None:
    limiter = make_limiter(requests_per_s=1000.0)
    for number in range(3):
        limiter.report("a", "reached", retry_after_s=backoff_s)
        assert (limiter.acquire("a", TIMEOUT_S) is None) is (is_open and number == 2)
        # Longer than the backoff.
        time.sleep(backoff_s + 0.01)
        limiter.report("a", "reached")


@settings(deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 15), st.sampled_from(OUTCOMES)), max_size=60),
    of_names=st.booleans(),
)
def test_sharded_rate_limiter_matches_single_one(
    requests: list[tuple[int, Outcome]], *, of_names: bool
) -> None:
    several = ShardedRateLimiter(tuple(Session(0).shared(make_limiter(1e6)) for _ in range(4)), 20)
    one = create_shared_limiter(make_limiter(1e6), Session(0))
    assert len(one.limiters) == 1
    for number, outcome in requests:
        host = f"h{number}"
        for limiters in (one, several):
            limiters.of(host).call("acquire", host, TIMEOUT_S)
            limiters.of(host).call("report", host, outcome)
    assert several.outage_reason(of_names=of_names) == one.outage_reason(of_names=of_names)
    assert len({id(several.of(f"h{number}")) for number in range(16)}) > 1


def test_shared_limiter_has_one_shard_per_sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_cores, num_limiters in ((1, 1), (31, 1), (64, 4), (10_000, 16)):
        monkeypatch.setattr(Session, "num_cores", lambda _, num=num_cores: num)
        assert len(create_shared_limiter(make_limiter(), Session(0)).limiters) == num_limiters


def test_shared_limiter_is_one_object_in_this_process() -> None:
    shared = Session(0).shared(make_limiter())
    assert shared.call("acquire", "a", TIMEOUT_S) == 0.0
    assert shared.call("acquire", "a", TIMEOUT_S) > 0.0
    assert pickle.loads(pickle.dumps(shared)).call("acquire", "a", TIMEOUT_S) > 0.0


@pytest.mark.parametrize(
    ("reason", "transient"),
    [
        *((f"http_{status}", True) for status in (408, 425, 429, 500, 503)),
        *((f"http_{status}", False) for status in (400, 403, 404, 410)),
        *((name, True) for name in ("timeout", "connect", "tls", "dead_host", "decode_timeout")),
        *((name, False) for name in ("no_such_host", "placeholder", "decode_error", "robots")),
    ],
)
def test_is_transient_separates_transient_from_permanent_failure(
    reason: str, transient: bool
) -> None:
    assert is_transient(reason) is transient

"""Rate limiter: the request rate of each host, its backoff, and a circuit breaker for dead hosts.

One limiter knows some or all hosts of a job; sharded over actors, it is shared by all workers. Must
not send requests itself.
"""

from __future__ import annotations

import heapq
import itertools
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from d2i.cluster import Session, SharedActor

_CORES_PER_LIMITER = 16
_MAX_LIMITERS = 16
"""Maximum number of shards; all run on the driver's node, and share its clock."""


@dataclass(frozen=True)
class ShardedRateLimiter:
    """Rate limiter that all workers share, sharded by host.

    Args:
        limiters: The shards, at least one.
        num_trouble_hosts: As in their limits.
    """

    limiters: tuple[SharedActor[RateLimiter], ...]
    num_trouble_hosts: int

    def of(self, host: str) -> SharedActor[RateLimiter]:
        """Return the shard that has a host, the same one for all workers."""
        return self.limiters[zlib.crc32(host.encode()) % len(self.limiters)]

    def outage_reason(self, *, of_names: bool) -> str | None:
        """Return why this machine's own network seems to be down, or None; see `detect_outage`."""
        reports = [limiter.call("network_health", of_names=of_names) for limiter in self.limiters]
        return detect_outage(reports, self.num_trouble_hosts, of_names=of_names)


def create_shared_limiter(limiter: RateLimiter, session: Session) -> ShardedRateLimiter:
    """Create a sharded limiter that all workers of a session share.

    Args:
        limiter: Initial state of each shard.
        session: The session.
    """
    fitting = session.num_cores() // _CORES_PER_LIMITER
    num_limiters = min(max(fitting, 1), _MAX_LIMITERS)
    limiters = tuple(session.shared(limiter) for _ in range(num_limiters))
    return ShardedRateLimiter(limiters, limiter.limits.num_trouble_hosts)


Outcome = Literal["reached", "unreached", "unnamed"]
"""Outcome of a request as a sign of our own network; `unnamed`: the host's name led nowhere, or to
a refused IP address."""

_NUM_BEGUN = 4096
"""Maximum number of hosts whose last request is remembered; the longest idle are evicted."""
_SHARE_UNREACHED = 0.9
_FEW_HOSTS = 8
"""That many hosts, none of them reached, are enough to stop (our default)."""


@dataclass(frozen=True)
class NetworkHealth:
    """Signs of our own network's health that one shard has seen.

    Args:
        lost: Reason if something that all requests need, such as a proxy, cannot be reached; else
            None.
        contacts: Time of each host's last request and its last known outcome, newest first.
    """

    lost: str | None
    contacts: list[tuple[float, Outcome]]


def detect_outage(
    reports: Sequence[NetworkHealth], window: int, *, of_names: bool = False
) -> str | None:
    """Return why this machine's own network, rather than dead hosts, seems to be at fault, or None.

    Hosts count in the order of their requests, not of their answers: live hosts answer long before
    dead ones fail, so a shard always ends with dead hosts.

    Args:
        reports: From all shards.
        window: Number of different hosts, requested last, that are judged; 0: none are.
        of_names: Report an outage only if all failures are failed lookups of host names.
    """
    for of_limiter in reports:
        if of_limiter.lost:
            return of_limiter.lost
    latest = heapq.merge(
        *(of_limiter.contacts for of_limiter in reports),
        key=lambda contact: contact[0],
        reverse=True,
    )
    contacts = [outcome for _, outcome in itertools.islice(latest, window)]
    if not contacts or (of_names and "unreached" in contacts):
        return None
    num_failed = len(contacts) - contacts.count("reached")
    is_outage = (
        num_failed >= min(_FEW_HOSTS, window)
        if num_failed == len(contacts)
        else len(contacts) == window and num_failed >= _SHARE_UNREACHED * window
    )
    if not is_outage:
        return None
    return f"{num_failed} of the last {len(contacts)} different hosts could not be reached"


@dataclass(frozen=True)
class HostLimits:
    """Request limits of one host.

    Args:
        requests_per_s: Most requests per second, over the whole job.
        num_failures: Requests in a row that never reached the host, or backoffs in a row, until it
            counts as dead.
        dead_s: How long a dead host gets no requests, in seconds.
        max_retry_after_s: A host that asks for a longer backoff counts as dead for that long.
        num_trouble_hosts: Number of different hosts, requested last, that show an outage of our own
            network; 0: none do.
    """

    requests_per_s: float
    num_failures: int
    dead_s: float
    max_retry_after_s: float
    num_trouble_hosts: int


@dataclass
class HostState:
    """State of one host; times on the limiter's clock, in seconds."""

    next_free: float = 0.0
    backoff_until: float = 0.0
    num_unreached: int = 0
    num_backoffs: int = 0
    num_answers: int = 0
    open_until: float = 0.0

    def record_failure(self, limits: HostLimits, now: float) -> None:
        """Count a request that never reached the host; too many in a row mark it dead."""
        self.num_unreached += 1
        if self.num_unreached >= limits.num_failures:
            self.open_circuit_breaker(now + limits.dead_s)

    def open_circuit_breaker(self, until: float) -> None:
        """Mark the host dead until a time: nobody sends it requests."""
        self.open_until = max(self.open_until, until)

    def begin_backoff(self, for_s: float, limits: HostLimits, now: float) -> None:
        """Start a backoff. After too many in a row mark the host dead, as waiters hold a thread.

        Backoffs are in a row if the host gave fewer answers in between than the seconds it now asks
        for (our default: one answer pays for one second).
        """
        # Requests that were in flight when the last backoff began show nothing new.
        if now >= self.backoff_until:
            self.num_backoffs = 1 if self.num_answers >= for_s else self.num_backoffs + 1
            self.num_answers = 0
        if for_s > limits.max_retry_after_s:
            # Nobody waits that long: the host is left to a later run.
            self.open_circuit_breaker(now + for_s)
        if self.num_backoffs >= limits.num_failures:
            self.open_circuit_breaker(now + limits.dead_s)
        self.backoff_until = max(self.backoff_until, now + for_s)
        self.next_free = max(self.next_free, self.backoff_until)


@dataclass
class RateLimiter:
    """Grants turns to request from a host. It has its own clock, so workers need no common one.

    Args:
        limits: Limits of each host.
        mirror: Host of the mirror that has a corpus's files, if it is a single one.
    """

    limits: HostLimits
    mirror: str | None = None
    _hosts: dict[str, HostState] = field(default_factory=dict)
    _begun: dict[str, tuple[float, Outcome | None]] = field(default_factory=dict)
    _proxy: HostState = field(default_factory=HostState)
    _num_mirror_failures: int = 0
    _has_mirror_answered: bool = False

    def acquire(self, host: str, timeout_s: float, *, is_named: bool = True) -> float | None:
        """Take the next turn of a host, unless it is further away than `timeout_s`.

        Args:
            host: As in `ssrf_guard.Target.netloc`.
            timeout_s: How long the caller can wait, in seconds.
            is_named: Whether a URL names it, and not a redirect by another host: only such hosts
                count for an outage.

        Returns:
            How long to wait before the request, in seconds; beyond `timeout_s`, no turn is taken.
                None if the host is dead for now or asks for a longer backoff than anybody waits
                for, or the proxy is dead.
        """
        now = time.monotonic()
        state = self._hosts.setdefault(host, HostState())
        if now < max(state.open_until, self._proxy.open_until):
            return None
        if state.backoff_until - now > self.limits.max_retry_after_s:
            return None
        turn = max(now, state.next_free)
        if turn - now <= timeout_s:
            state.next_free = turn + 1.0 / self.limits.requests_per_s
            if is_named:
                self._begin(host)
        return turn - now

    def in_backoff(self, host: str) -> bool:
        """Return whether a host is in backoff or dead; checked again after waiting for a turn."""
        state = self._hosts.setdefault(host, HostState())
        return time.monotonic() < max(state.backoff_until, state.open_until)

    def report(self, host: str, outcome: Outcome, *, retry_after_s: float = 0.0) -> None:
        """Record the outcome of a request, and the backoff that its host asks for, in seconds."""
        now = time.monotonic()
        state = self._hosts.setdefault(host, HostState())
        self._begun[host] = (self._begun.get(host, (now, None))[0], outcome)
        if host == self.mirror:
            self._record_mirror(outcome)
        if outcome == "reached":
            state.num_unreached = self._proxy.num_unreached = 0
        elif outcome == "unreached":
            state.record_failure(self.limits, now)
        if retry_after_s > 0.0:
            state.begin_backoff(retry_after_s, self.limits, now)
        elif outcome == "reached":
            state.num_answers += 1

    def report_proxy_unreached(self) -> None:
        """Record that the proxy took no connection, which shows nothing about the host."""
        self._proxy.record_failure(self.limits, time.monotonic())

    def network_health(self, *, of_names: bool = False) -> NetworkHealth:
        """Return the signs of this machine's own network.

        Args:
            of_names: Whether to report only failed lookups of host names.
        """
        window = self.limits.num_trouble_hosts
        known = [(begun_s, outcome) for begun_s, outcome in self._begun.values() if outcome]
        lost: str | None = None
        if self._proxy.num_unreached >= self.limits.num_failures and not of_names:
            lost = f"the proxy could not be reached {self._proxy.num_unreached} times in a row"
        elif window and self._is_mirror_lost(of_names=of_names):
            lost = f"the mirror {self.mirror} could not be reached (check fetch.mirror)"
        return NetworkHealth(lost, heapq.nlargest(window, known, key=lambda contact: contact[0]))

    def _record_mirror(self, outcome: Outcome) -> None:
        is_reached = outcome == "reached"
        self._has_mirror_answered |= is_reached
        self._num_mirror_failures = 0 if is_reached else self._num_mirror_failures + 1

    def _is_mirror_lost(self, *, of_names: bool) -> bool:
        """Return whether it never answered, or keeps failing: one host, but all images."""
        if self.mirror is None:
            return False
        if of_names and self._begun.get(self.mirror, (0.0, None))[1] != "unnamed":
            return False
        few = self.limits.num_failures if self._has_mirror_answered else 1
        return self._num_mirror_failures >= few

    def _begin(self, host: str) -> None:
        # The last outcome holds until the next answer, or a busy host would never have one.
        self._begun[host] = (time.monotonic(), self._begun.pop(host, (0.0, None))[1])
        if len(self._begun) > _NUM_BEGUN:
            del self._begun[next(iter(self._begun))]
